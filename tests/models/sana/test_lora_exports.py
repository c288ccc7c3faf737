"""LoRA files out: strength 1 for every layer in diffusers, PEFT and ComfyUI, one meaning each."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.lora_files import (
    TESTED_DIFFUSERS,
    Lora,
    merge_lora,
    read_lora,
    save_comfyui_lora,
    save_diffusers_lora,
)
from mfd_fast.models.sana.lora_layers import BLOCK_LAYERS, OUTER_LAYERS, original_layer
from mfd_fast.models.sana.network import SanaNetwork
from mfd_fast.models.sana.tiny import TRANSFORMER
from mfd_fast.testing.numerics import assert_as_accurate

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from lora_networks import (  # noqa: E402
    LAYERS,
    QKV,
    assert_strength_one,
    deltas_of,
    network,
    random_lora,
)


@pytest.fixture
def stacked():
    """Student on q, k and v, teacher's LoRA on every layer, of other ranks and alphas."""
    student = random_lora(QKV, rank=8, seed=1)
    return student, student.stacked_on(random_lora(LAYERS, rank=3, seed=2))


def deltas_in(model, adapter):
    return {
        name: module.get_delta_weight(adapter).detach().flatten(1)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_deltas(found, lora):
    wanted = deltas_of(lora)
    assert found.keys() == wanted.keys()
    for name, (eager, exact) in wanted.items():
        assert_as_accurate(found[name], eager, exact)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_diffusers_gives_every_layer_strength_one(stacked, with_metadata, tmp_path):
    path = tmp_path / "student.safetensors"
    for lora in stacked:
        save_diffusers_lora(lora, path, description="both")
        if not with_metadata:  # as readers do that know nothing of it
            save_file(load_file(path), path)
        pipe = diffusers.SanaPipeline(None, None, None, network(), None)
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
        assert_deltas(deltas_in(pipe.transformer, "default_0"), lora)
        assert_strength_one(read_lora(path), deltas_of(lora))


def test_peft_gives_every_layer_strength_one_by_the_files_own_config(stacked, tmp_path):
    for lora in stacked:
        path = tmp_path / "student.safetensors"
        save_diffusers_lora(lora, path, description="both")
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        model = peft.get_peft_model(network(), peft.LoraConfig(**config))
        state = {k.replace("transformer.", "base_model.model.", 1): v
                 for k, v in load_file(path).items()}  # fmt: skip
        result = peft.set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys
        found = deltas_in(model, "default")
        found = {key.removeprefix("base_model.model."): value for key, value in found.items()}
        assert_deltas(found, lora)


def test_comfyui_gives_every_layer_strength_one(stacked, tmp_path):
    """Its rule, delta = alpha / r up down, on the original's fused layers; whole or in part."""
    path = tmp_path / "comfyui.safetensors"
    some = Lora({k: v for k, v in stacked[1].factors.items() if "to_k" in k or "conv" in k})
    for lora in (*stacked, some):
        save_comfyui_lora(lora, path, description="both")
        state, wanted = load_file(path), deltas_of(lora)
        seen = set()
        for key in (key for key in state if key.endswith(".alpha")):
            stem = key.removesuffix(".alpha")
            down, up = (state[f"{stem}.lora_{x}.weight"].flatten(1) for x in ("down", "up"))
            parts = next(
                original_layer(name)[1]
                for name in wanted
                if f"diffusion_model.{original_layer(name)[0]}" == stem
            )
            found = (state[key] / len(down) * up @ down).chunk(len(parts))
            for name, delta in zip(parts, found, strict=True):
                eager, exact = wanted.get(name, (torch.zeros(()), torch.zeros((), dtype=float)))
                seen.add(name)
                assert_as_accurate(delta, eager.expand_as(delta), exact.expand_as(delta))
        assert seen >= wanted.keys()
        network_ = SanaNetwork(SanaConfig.from_dict(TRANSFORMER))
        twin = SanaNetwork(SanaConfig.from_dict(TRANSFORMER))
        twin.load_state_dict(network_.state_dict())
        merge_lora(network_, lora)
        merge_lora(twin, read_lora(path))  # it is also read back
        for one, two in zip(network_.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("entries", [TRANSFORMER, TRANSFORMER | {"guidance_embeds": True}])
def test_every_layer_that_may_have_an_adapter_has_a_name_in_the_original(entries):
    model = diffusers.SanaTransformer2DModel(**entries)
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    }
    originals = {name: original_layer(name) for name in layers}
    assert all(name in parts for name, (_, parts) in originals.items())
    per_block = list(itertools.chain.from_iterable(ours for ours, _ in BLOCK_LAYERS))
    outer = {ours for ours, _ in OUTER_LAYERS}
    blocks = {f"transformer_blocks.{n}.{name}" for n in (0, 1) for name in per_block}
    assert blocks <= layers <= blocks | outer
    with pytest.raises(ValueError, match=r"has no layer for 'somewhere\.else'"):
        original_layer("somewhere.else")


def test_the_description_is_in_the_file(stacked, tmp_path):
    for save in (save_diffusers_lora, save_comfyui_lora):
        save(stacked[0], tmp_path / "x.safetensors", description="a student of SANA")
        with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
            assert file.metadata()["description"] == "a student of SANA"


def test_the_installed_diffusers_is_one_that_the_docs_name():
    oldest, newest = TESTED_DIFFUSERS[0], TESTED_DIFFUSERS[-1]

    def number(version):
        return tuple(int(part) for part in version.split(".")[:2])

    assert number(oldest) <= number(diffusers.__version__)
    assert number(diffusers.__version__) <= number(newest), "test it, then name it in docs/sana.md"
