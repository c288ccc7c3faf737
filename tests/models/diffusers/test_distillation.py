"""The library form: losses are the updates', files give the same images in the stock pipeline."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_networks import draw_adapter
from tiny_pipelines import tiny_pipeline

from mfd_fast import DistillConfig, OptimConfig
from mfd_fast.diffusers import distillation
from mfd_fast.distill.optim import make_optimizer
from mfd_fast.models.diffusers.record import record_call

PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow under the stars"]
OPTIM = OptimConfig(lr=1e-3, clip_norm=0.0, weight_decay=0.0)
CONFIG = DistillConfig(aux_updates=3, step_size=0.25, aux_optim=OPTIM, student_optim=OPTIM)
BOUND = 1e-3


def made(name, **options):
    pipe = tiny_pipeline(name)
    return distillation(pipe, height=64, width=64, rank=2, config=CONFIG, **options)


@pytest.mark.parametrize("name", ["sd3", "qwen-image"])
def test_own_loop_over_20_updates_is_step(name):
    theirs, ours = made(name, steps=2), made(name, steps=2)
    optimizers = {role: make_optimizer(ours.parameters(role), OPTIM) for role in ("aux", "student")}
    cond = ours.cond(PROMPTS)
    for _ in range(20):
        theirs.step(cond)
        role = ours.next_role
        loss = ours.aux_loss(cond) if role == "aux" else ours.student_loss(cond)
        loss.backward()
        optimizers[role].step()
        optimizers[role].zero_grad()
    for role in optimizers:
        assert torch.equal(theirs.parameters(role)[0], ours.parameters(role)[0])
    assert torch.equal(theirs.generate(PROMPTS), ours.generate(cond))
    assert ours.generate(PROMPTS).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["sd3", "qwen-image", "flux1-dev"])
def test_the_folder_gives_our_samples_in_the_stock_pipeline(name, tmp_path):
    first, second = (tmp_path / f"{number}" for number in range(2))
    for seed, folder in enumerate((first, second)):
        adapter = made(name, steps=2)
        draw_adapter(adapter.backbone.adapters, "student", seed)
        adapter.save(folder)
    files = {str(first / "student.safetensors"): 0.5, str(second / "student.safetensors"): 0.25}
    student = made(name, steps=2, teacher_lora=files)
    draw_adapter(student.backbone.adapters, "student", 7)
    written = student.save(tmp_path / "student")
    with pytest.warns(UserWarning, match="still what it started as"):
        ours = student.latents(PROMPTS, seed=3)

    noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    call = {k: v for k, v in student.sampler.call.items() if k != "num_inference_steps"}
    pipe = tiny_pipeline(name)
    pipe.load_lora_weights(str(tmp_path / "student" / "student_with_teacher_lora.safetensors"))
    scheduler = tmp_path / "student" / "scheduler_config.json"
    if scheduler in written:
        pipe.scheduler = type(pipe.scheduler).from_config(json.loads(scheduler.read_text()))
    student.family.pipe = pipe
    theirs = record_call(student.family, noise, 2, prompt=list(PROMPTS), **call)
    assert theirs.schedule == student.sampler.schedule
    assert (ours - theirs.end).abs().max() < BOUND
    assert (scheduler in written) == (name == "qwen-image")
    assert 'weight_name="student_with_teacher_lora' in (scheduler.parent / "README.md").read_text()
    assert all(key.startswith("transformer.") for key in load_file(written[0]))


@pytest.mark.parametrize("name", ["sd3", "flux2-klein", "flux1-dev"])
def test_a_transformer_alone_is_distilled_like_its_pipeline(name):
    """With the scheduler, and conditions that were encoded before."""
    whole = made(name, steps=2)
    cond = whole.cond(PROMPTS)
    null = whole.family.encode_null() if whole.family.has_null else None
    pipe = tiny_pipeline(name)
    if name == "flux2-klein":
        with pytest.raises(ValueError, match=r"FLUX\.2's pipeline norms latents by its VAE: give"):
            distillation(pipe.transformer, scheduler=pipe.scheduler)
    alone = distillation(
        pipe.transformer, scheduler=pipe.scheduler, vae=pipe.vae, cond=cond, null=null,
        height=64, width=64, rank=2, config=CONFIG, steps=2,
    )  # fmt: skip
    assert type(alone.family) is type(whole.family)
    for _ in range(4):
        first, second = whole.step(cond), alone.step(cond)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (torch.nn.Linear(1, 1), {"scheduler": 1}, "Linear has no adapter; there are"),
        (torch.nn.Linear(1, 1), {}, "give scheduler, as the pipeline has it, and cond and null"),
        (object(), {"scheduler": 1}, "belong to a transformer; the pipeline has its own"),
    ],
)
def test_a_network_that_is_not_enough_is_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        distillation(network, **options)


def test_adapters_in_the_model_are_adopted(tmp_path):
    teacher = made("sd3", steps=1)
    draw_adapter(teacher.backbone.adapters, "student", 1)
    teacher.save(tmp_path)
    pipe = tiny_pipeline("sd3")
    pipe.load_lora_weights(str(tmp_path / "student.safetensors"))
    noise = torch.randn(2, 4, 8, 8)
    before = pipe(prompt=list(PROMPTS), height=64, width=64, latents=noise, output_type="latent",
                  num_inference_steps=2).images  # fmt: skip
    adopted = distillation(pipe, height=64, width=64, rank=2, config=CONFIG)
    assert adopted.teacher_lora is not None
    after = pipe(prompt=list(PROMPTS), height=64, width=64, latents=noise, output_type="latent",
                 num_inference_steps=2).images  # fmt: skip
    assert (before - after).abs().max() < BOUND


def test_text_encoders_may_be_gone():
    with_text = made("z-image", steps=2)
    cond, null = with_text.cond(PROMPTS), with_text.family.null_row
    pipe = tiny_pipeline("z-image")
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.raises(ValueError, match="give cond and null"):
        distillation(pipe, height=64, width=64, rank=2, config=CONFIG)
    without = distillation(
        pipe, height=64, width=64, rank=2, steps=2, config=CONFIG, cond=cond, null=null
    )
    for d in (with_text, without):
        for _ in range(4):
            d.step(cond)
    assert torch.equal(with_text.parameters("student")[0], without.parameters("student")[0])
