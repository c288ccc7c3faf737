"""Out of the run and into diffusers: the student's sampler, its LoRA file, the decoded images."""

import inspect
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from sana_models import make_exact
from small_networks import draw_adapter

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.flow.integrate import generate
from mfd_fast.models.sana import load_sana_transformer
from mfd_fast.models.sana.decoder import LatentDecoder
from mfd_fast.models.sana.lora_files import (
    Lora,
    merge_lora,
    read_lora,
    save_comfyui_lora,
    save_diffusers_lora,
)
from mfd_fast.models.sana.sampler import EXPECTED, SCHEDULER, SOLVER, load_schedule, schedule_of
from mfd_fast.models.sana.tiny import make_tiny_checkpoint
from mfd_fast.testing.numerics import assert_as_accurate

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red cube", "two cats"]
SIZE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("sana-tiny"))


@pytest.fixture
def pipeline(checkpoint):
    pipe = diffusers.SanaPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def lora(checkpoint):
    """A student whose adapters all do something, with alpha other than the rank."""
    network = load_sana_transformer(checkpoint, dtype=torch.float32)
    bank = AdapterBank(network, rank=4, alpha=6.0)
    draw_adapter(bank, "student", 3)
    return Lora.of(bank, "student")


def noise_and_text(pipeline):
    text, mask, _, _ = pipeline.encode_prompt(PROMPTS, False)
    noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise, {"text": text, "mask": mask.bool()}


def run_pipeline(pipeline, noise, cond, steps, output_type="latent"):
    return pipeline(
        prompt_embeds=cond["text"],
        prompt_attention_mask=cond["mask"].long(),
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=1.0,
        height=SIZE,
        width=SIZE,
        use_resolution_binning=False,
        output_type=output_type,
    ).images


@torch.no_grad()
def run_ours(network, checkpoint, noise, cond, steps):
    prepared = network.prepare(cond)
    schedule = load_schedule(checkpoint)(steps)
    return generate(
        lambda x, t: network(x, t, prepared), noise, steps=steps, solver=SOLVER, schedule=schedule
    )


@torch.no_grad()
def run_exact(transformer, checkpoint, noise, cond, steps):
    exact = make_exact(transformer)

    def velocity(x, t):
        mask = cond["mask"].long()
        time = (1000 * t.double()).round()
        return exact(
            x, cond["text"].double(), time, encoder_attention_mask=mask, return_dict=False
        )[0]

    schedule = load_schedule(checkpoint)(steps)
    return generate(velocity, noise.double(), steps=steps, solver=SOLVER, schedule=schedule)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_sampler_is_the_pipelines(checkpoint, pipeline, steps):
    noise, cond = noise_and_text(pipeline)
    network = load_sana_transformer(checkpoint, dtype=torch.float32, time_table=True)
    assert_as_accurate(
        run_ours(network, checkpoint, noise, cond, steps).double(),
        run_pipeline(pipeline, noise, cond, steps).double(),
        run_exact(pipeline.transformer, checkpoint, noise, cond, steps),
    )


def test_the_pipeline_loads_the_exported_lora_and_paints_our_images(
    checkpoint, pipeline, lora, tmp_path
):
    pytest.importorskip("peft")
    path = tmp_path / "student.safetensors"
    save_diffusers_lora(lora, path, description="a student")
    noise, cond = noise_and_text(pipeline)
    network = load_sana_transformer(checkpoint, dtype=torch.float32)
    before = run_ours(network, checkpoint, noise, cond, 4)
    merge_lora(network, read_lora(path))
    ours = run_ours(network, checkpoint, noise, cond, 4)
    assert (ours - before).norm() > 0.01 * before.norm()  # the adapters do something

    pipeline.load_lora_weights(str(path))
    theirs = run_pipeline(pipeline, noise, cond, 4)
    assert_as_accurate(
        ours.double(),
        theirs.double(),
        run_exact(pipeline.transformer, checkpoint, noise, cond, 4),
    )
    images = LatentDecoder(checkpoint)(ours)
    painted = run_pipeline(pipeline, noise, cond, 4, output_type="pt")
    steps_of_255 = (images.float() - painted * 255).abs().max()
    assert images.dtype == torch.uint8 and images.shape == (2, 3, SIZE, SIZE)
    assert steps_of_255 <= 1  # rounding to whole values, and nothing else


def test_a_lora_of_diffusers_is_read_with_its_alpha(checkpoint, pipeline, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v", "to_out.0"])
    transformer = pipeline.transformer
    transformer.add_adapter(config, "default")
    torch.manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    layers = peft.get_peft_model_state_dict(transformer, adapter_name="default")
    diffusers.SanaPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    noise, cond = noise_and_text(pipeline)
    network = load_sana_transformer(checkpoint, dtype=torch.float32)
    merge_lora(network, read_lora(tmp_path / "pytorch_lora_weights.safetensors"))
    assert_as_accurate(
        run_ours(network, checkpoint, noise, cond, 2).double(),
        run_pipeline(pipeline, noise, cond, 2).double(),
        run_exact(transformer, checkpoint, noise, cond, 2),
    )


def test_two_loras_in_one_file_add_what_both_add(checkpoint, lora):
    half = Lora({name: (a, b / 2) for name, (a, b) in list(lora.factors.items())[:3]})
    both = lora.stacked_on(half)
    for name, (a, b) in both.factors.items():
        one, two = (x.factors.get(name) for x in (lora, half))
        added = sum(b @ a for a, b in (one, two) if a is not None) if two else one[1] @ one[0]
        exact = (b.double() @ a.double(), added.double())
        assert_as_accurate(b @ a, added, exact[0])


def test_comfyui_gets_fused_layers_with_the_same_deltas(lora, tmp_path):
    path = tmp_path / "comfy.safetensors"
    save_comfyui_lora(lora, path, description="a student")
    state = load_file(path)
    assert {key.split(".", 3)[3].rsplit(".lora", 1)[0].removesuffix(".alpha") for key in state} == {
        "attn.qkv", "cross_attn.q_linear", "cross_attn.kv_linear",
    }  # fmt: skip
    for block in (0, 1):
        for theirs, attention, layers in (
            ("attn.qkv", "attn1", ("to_q", "to_k", "to_v")),
            ("cross_attn.q_linear", "attn2", ("to_q",)),
            ("cross_attn.kv_linear", "attn2", ("to_k", "to_v")),
        ):
            key = f"diffusion_model.blocks.{block}.{theirs}"
            down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
            scale = state[f"{key}.alpha"] / len(down)
            factors = [
                lora.factors[f"transformer_blocks.{block}.{attention}.{layer}"] for layer in layers
            ]
            eager = torch.cat([b @ a for a, b in factors])
            exact = torch.cat([b.double() @ a.double() for a, b in factors])
            assert_as_accurate(scale * up @ down, eager, exact)


def test_files_that_are_no_lora_are_refused(lora, checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no LoRA file .*none\.safetensors"):
        read_lora(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(ValueError, match="only safetensors are read"):
        read_lora(broken)
    other = tmp_path / "other.safetensors"
    save_file({"layer.weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"is no LoRA of linear layers alone"):
        read_lora(other)
    half = tmp_path / "half.safetensors"
    save_file({"transformer.a.lora_A.weight": torch.zeros(2, 2)}, half)
    with pytest.raises(ValueError, match=r"no transformer\.a\.lora_B\.weight"):
        read_lora(half)
    network = load_sana_transformer(checkpoint, dtype=torch.float32)
    foreign = Lora({"somewhere.else": next(iter(lora.factors.values()))})
    with pytest.raises(ValueError, match="does not fit this network"):
        merge_lora(network, foreign)


@pytest.mark.parametrize(
    ("entry", "value"), [("algorithm_type", "sde-dpmsolver++"), ("use_flow_sigmas", False)]
)
def test_another_sampler_is_refused_by_its_entry(tmp_path, checkpoint, entry, value):
    entries = json.loads((checkpoint / SCHEDULER).read_text()) | {entry: value}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / SCHEDULER).write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=re.escape(f"scheduler has {entry}={value!r}")):
        load_schedule(tmp_path)


@pytest.mark.parametrize("entry", sorted(EXPECTED))
def test_an_entry_that_is_not_there_means_what_diffusers_takes(entry, checkpoint):
    """The same schedule as with the class's default written out, or refused as that is."""
    entries = json.loads((checkpoint / SCHEDULER).read_text())
    parameters = inspect.signature(diffusers.DPMSolverMultistepScheduler).parameters
    default = None if entry == "_class_name" else parameters[entry].default
    absent = {key: value for key, value in entries.items() if key != entry}
    if default == EXPECTED[entry]:
        assert schedule_of(absent)(4) == schedule_of(entries)(4)
    else:
        for told in (absent, entries | {entry: default}):
            with pytest.raises(ValueError, match=f"scheduler has {entry}={default!r}"):
                schedule_of(told)


def test_the_other_entries_of_a_scheduler_are_diffusers_defaults_and_numbers(checkpoint):
    entries = json.loads((checkpoint / SCHEDULER).read_text())
    parameters = inspect.signature(diffusers.DPMSolverMultistepScheduler).parameters
    for key in ("flow_shift", "num_train_timesteps"):
        absent = {name: value for name, value in entries.items() if name != key}
        told = entries | {key: parameters[key].default}
        assert schedule_of(absent)(4) == schedule_of(told)(4)
        for wrong in (0, -1, float("nan"), float("inf"), "3", None, True):
            with pytest.raises(ValueError, match=f"{key}={wrong!r}"):
                schedule_of(entries | {key: wrong})
