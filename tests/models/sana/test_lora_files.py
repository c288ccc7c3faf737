"""LoRA files in: every convention at the strength that PEFT itself gives it, or one sentence."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mfd_fast.models.sana.lora_files import read_lora

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from lora_networks import LAYERS, QKV, assert_strength_one, network  # noqa: E402

CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True},
    "ranks": {"r": 4, "lora_alpha": 4, "rank_pattern": {"attn2.to_q": 2, r".*\.0\.attn1\.to_v": 6}},
    "alphas": {
        "r": 8,
        "lora_alpha": 8,
        "alpha_pattern": {r"transformer_blocks\.0\..*": 32, r"1\.attn1\.to_k": 3, r"^proj_out": 5},
    },
    "all": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {r"transformer_blocks\.1\.attn1\.to_(q|k)": 9, "conv_point": 1},
        "alpha_pattern": {"attn1.to_q": 7, "q": 1000, r"(?:.*)ff\.conv_inverted": 2},
    },
}


def trained(targets=LAYERS, **settings):
    """A PEFT model whose adapters all do something, and the delta of every layer by PEFT."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=targets, **settings)
    model = peft.get_peft_model(network(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    deltas = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            scale = module.scaling["default"]
            factors = [getattr(module, f"lora_{x}")["default"].weight.detach() for x in "AB"]
            exact = scale * factors[1].double().flatten(1) @ factors[0].double().flatten(1)
            delta = module.get_delta_weight("default").detach().flatten(1)
            deltas[name.removeprefix("base_model.model.")] = (delta, exact)
    return model, deltas


def saved_by_peft(model, folder):
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def saved_by_pipeline(model, folder):
    layers = peft.get_peft_model_state_dict(model)
    layers = {key.removeprefix("base_model.model."): value for key, value in layers.items()}
    diffusers.SanaPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


def saved_by_model(model, folder):
    """diffusers' ``transformer.save_lora_adapter``: names and metadata without a prefix."""
    transformer = model.base_model.model
    transformer._hf_peft_config_loaded = True
    transformer.peft_config = model.peft_config
    transformer.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


def saved_with_alphas(model, folder, spell):
    """The files of sd-scripts and OneTrainer: lora_down, lora_up and an alpha for every layer."""
    state = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            key = spell(name.removeprefix("base_model.model."))
            a, b = (getattr(module, f"lora_{x}")["default"].weight.detach() for x in "AB")
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = a, b
            state[f"{key}.alpha"] = torch.tensor(module.scaling["default"] * len(a))
    save_file(state, folder / "alphas.safetensors")
    return folder / "alphas.safetensors"


def saved_by_onetrainer(model, folder):
    return saved_with_alphas(model, folder, lambda name: f"transformer.{name}")


def saved_by_kohya(model, folder):
    return saved_with_alphas(model, folder, lambda name: "lora_unet_" + name.replace(".", "_"))


def saved_by_compiled(model, folder):
    """Keys of a network that was compiled before it was wrapped."""
    return saved_with_alphas(model, folder, lambda name: f"base_model.model._orig_mod.{name}")


CONVENTIONS = [saved_by_peft, saved_by_pipeline, saved_by_model, saved_by_onetrainer]
CONVENTIONS += [saved_by_kohya, saved_by_compiled]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("save", CONVENTIONS)
def test_every_convention_is_read_at_the_strength_peft_gives_it(save, config, tmp_path):
    model, deltas = trained(**CONFIGS[config])
    assert_strength_one(read_lora(save(model, tmp_path)), deltas)


def test_files_without_alpha_have_the_strength_their_readers_give_them(tmp_path):
    model, deltas = trained(r=4, lora_alpha=4)
    path = saved_by_pipeline(model, tmp_path)
    save_file(load_file(path), path)
    assert_strength_one(read_lora(path), deltas)
    state = {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value
        for key, value in load_file(path).items()
    }
    save_file(state, path)
    assert_strength_one(read_lora(path), deltas)


def files(tmp_path, targets=QKV, **settings):
    """The parts of a file to break: its path, its tensors and its config."""
    model, _ = trained(targets, **({"r": 4, "lora_alpha": 8} | settings))
    path = saved_by_pipeline(model, tmp_path)
    config = model.peft_config["default"]
    config = {key: list(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    return path, load_file(path), {f"transformer.{key}": value for key, value in config.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha must be a number > 0, got None: strength unknown"),
        ({"lora_alpha": 0}, "lora_alpha must be a number > 0, got 0"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number > 0, got '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number > 0, got nan"),
        ({"r": 5}, "rank 5, its factors have 4: strength unknown"),
        ({"r": None}, "r must be a number > 0, got None"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern: to_q must be a number > 0, got None"),
        (
            {"alpha_pattern": {"to_q": 2, r".*attn1\..*": 3}},
            "alpha 2.0 and 3.0 by different entries of alpha_pattern: strength unknown",
        ),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern must map names to numbers"),
        ({"alpha_pattern": {"to_(q": 3}}, "'to_(q' in alpha_pattern is no regular expression"),
        ({"rank_pattern": {"to_q": 2}}, "rank 2, its factors have 4"),
        ({"use_dora": True}, "has use_dora=True"),
        ({"lora_bias": True}, "has lora_bias=True"),
        ({"bias": "all"}, "has bias='all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4'"),
        ({"peft_type": "LOHA"}, "has peft_type='LOHA'"),
        ({"modules_to_save": ["proj_out"]}, r"has modules_to_save=['proj_out']"),
        ({"an_entry_of_the_future": 2}, "has an_entry_of_the_future=2"),
    ],
)
def test_a_config_that_does_not_say_the_strength_is_refused(change, message, tmp_path):
    path, state, config = files(tmp_path)
    config |= {f"transformer.{key}": value for key, value in change.items()}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[1]", "got a list"), ("{}", "r must")],
)
@pytest.mark.parametrize("beside", [False, True])
def test_broken_metadata_names_its_file(text, message, beside, tmp_path):
    path, state, _ = files(tmp_path)
    if beside:
        (tmp_path / "adapter_config.json").write_text(text)
        save_file({k.replace("transformer.", "base_model.model.", 1): v for k, v in state.items()},
                  path)  # fmt: skip
        assert_refused(path, message, tmp_path / "adapter_config.json")
    else:
        save_file(state, path, metadata={"lora_adapter_metadata": text})
        assert_refused(path, message)


def assert_refused(path, message, named=None):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_lora(path)
    assert str(named or path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_does_not_say_its_strength_is_refused(tmp_path):
    path, state, config = files(tmp_path)
    unknown = "is unknown (nothing says it); put the adapter_config.json"
    foreign = {k.replace("transformer.", "base_model.model.", 1): v for k, v in state.items()}
    save_file(foreign, path)
    assert_refused(path, unknown)
    save_file({key.removeprefix("transformer."): value for key, value in state.items()}, path)
    assert_refused(path, unknown)
    path, ranks, _ = files(tmp_path, rank_pattern={"attn1.to_q": 2})
    save_file(ranks, path)
    assert_refused(path, unknown)  # releases of diffusers read it differently
    stem = "transformer.transformer_blocks.0.attn1.to_q"
    save_file(state | {f"{stem}.alpha": torch.tensor(8.0)}, path)
    assert_refused(path, unknown)  # the other layers have none
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(state | {f"{stem}.alpha": torch.tensor(4.0)}, path, metadata=metadata)
    assert_refused(path, f"attn1.to_q is unknown (2 by {path}: its lora_adapter_metadata, 1 by")
    save_file(state, path)
    bare = {key.removeprefix("transformer."): value for key, value in config.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(bare))
    assert_refused(path, "1 by a file without alpha")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha", torch.tensor(0.0), "alpha must be a number > 0, got [0.0]"),
        ("alpha", torch.tensor(float("inf")), "alpha must be a number > 0, got [inf]"),
        ("alpha", torch.ones(2), "alpha must be a number > 0, got [1.0, 1.0]"),
        ("lora_A.weight", torch.ones(3, 64), "got [3, 64] and [64, 4]"),
        ("lora_A.weight", torch.ones(0, 64), "got [0, 64] and [64, 4]"),
        ("lora_A.weight", torch.ones(4), "got [4] and [64, 4]"),
        ("lora_A.weight", torch.ones(4, 64, 3, 3), "got [4, 64, 3, 3] and [64, 4]"),
        ("lora_magnitude_vector", torch.ones(64), "to_q.lora_magnitude_vector"),
        ("dora_scale", torch.ones(64), "to_q.dora_scale"),
        ("lora_B.bias", torch.ones(64), "to_q.lora_B.bias"),
        ("diff_b", torch.ones(64), "to_q.diff_b"),
    ],
)
def test_a_broken_or_foreign_layer_is_named(name, value, message, tmp_path):
    path, state, _ = files(tmp_path)
    stem = "transformer.transformer_blocks.0.attn1.to_q"
    save_file(state | {f"{stem}.{name}": value}, path)
    assert_refused(path, message)


def test_a_layer_that_is_there_under_two_names_is_refused(tmp_path):
    path, state, _ = files(tmp_path)
    twice = {f"diffusion_model.blocks.0.attn.qkv.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}
    save_file(state | twice, path)
    assert_refused(path, "rows in all or is there twice; copy it again")
