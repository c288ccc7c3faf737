"""Every family on a tiny random pipeline: its own loop against our engine."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from small_networks import draw_adapter
from tiny_pipelines import FRAMES, PIPELINES, SIDES, tiny_pipeline, tiny_size

from mfd_fast import DistillConfig, make_distiller
from mfd_fast.models.diffusers.backbone import backbone_of, teacher_samples
from mfd_fast.models.diffusers.checkpoint import pipeline_around
from mfd_fast.models.diffusers.family import FAMILIES, family_of
from mfd_fast.models.diffusers.lengths import OwnLengths
from mfd_fast.models.diffusers.network import FamilyNetwork
from mfd_fast.models.diffusers.record import record, record_call
from mfd_fast.models.diffusers.sampler import student_sampler
from mfd_fast.models.sana.lora_files import Lora, merge_lora

PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow under the stars"]
CALLS = {
    "qwen-image": {"negative_prompt": [" ", " "]},  # without one it is not guided
    "sana": {"use_resolution_binning": False},
}
SAME = ["a red fox", "a cat nap"]  # of one length, for a network that takes no other
NO_SINGLE = (("ltx", 1), ("cosmos2", 1))  # whose own single step is at no number, or is none
BOUND = 1e-3  # latents reach 3 to 8; a wrong sign, time or scale is off by more than .1

families = pytest.mark.parametrize("name", PIPELINES)


def make_family(name, **options):
    return family_of(tiny_pipeline(name), **tiny_size(name), **options)


@cache
def shared_family(name):
    """For tests that change nothing."""
    return make_family(name)


def prompts_of(name):
    return SAME if name == "omnigen" else PROMPTS


def their_call(name):
    """Arguments of the pipeline's call as a user writes them."""
    frames = shared_family(name).extra if name in FRAMES else {}
    return {"prompt": list(prompts_of(name))} | CALLS.get(name, {}) | frames


def their_record(name, family, noise, steps, **call):
    """What the pipeline makes of the prompts, of each alone where it attends to their padding."""
    call = their_call(name) | call
    if not isinstance(family, OwnLengths):
        return record_call(family, noise, steps, **call)
    made = [
        record_call(family, row, steps, **call | {"prompt": [prompt]})
        for row, prompt in zip(noise.split(1), PROMPTS, strict=True)
    ]
    schedules, ends = zip(*((x.schedule, x.end) for x in made), strict=True)
    assert schedules[0] == schedules[1]
    return SimpleNamespace(schedule=schedules[0], end=torch.cat(ends))


def noise_of(family, rows=2):
    return torch.randn(rows, *family.sample_shape, generator=torch.Generator().manual_seed(1))


def farthest(a, b):
    return float((a - b).abs().max())


@families
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_pipeline_is_our_teacher_by_our_solver(name, steps):
    """With prompts of two lengths in one batch, guided as by default."""
    family = shared_family(name)
    cond, noise = family.encode(prompts_of(name)), noise_of(family)
    if steps < family.least_steps:
        with pytest.raises(ZeroDivisionError):
            record(family, cond, noise, steps)
        return
    own, schedule = family.pipe.scheduler, None
    if (name, steps) == ("ltx", 1):
        with pytest.raises(IndexError):
            record(family, cond, noise, steps)
    else:
        first = {leaf: value[:1] for leaf, value in cond.items()}
        schedule = record(family, first, noise[:1], steps).schedule
    is_undefined = schedule is None or any(node != node for node in schedule.nodes)
    is_undefined = is_undefined or not schedule.times
    assert is_undefined == (steps == 1 and (own.config.get("shift_terminal") is not None
                                            or name == "cosmos2"))  # fmt: skip
    if is_undefined or "solver_order" in own.config:  # then Euler on our nodes
        sampler = student_sampler(family, cond, steps)
        schedule, family.pipe.scheduler = sampler.schedule, sampler.scheduler
    theirs = their_record(name, family, noise, steps)
    family.pipe.scheduler = own
    assert theirs.schedule == schedule
    ours = teacher_samples(backbone_of(family, rank=2), cond, noise, schedule, family.guidance)
    assert farthest(ours, theirs.end) < BOUND


@families
def test_decoding_is_the_pipelines(name):
    family, side = shared_family(name), SIDES.get(name, 64)
    noise = noise_of(family)
    call = their_call(name) | {"output_type": "pt", "height": side, "width": side}
    call |= {"num_inference_steps": 2, "latents": family.pipe_latents(noise)}
    end = record_call(family, noise, 2, **their_call(name)).end
    made = family.decode(end)
    frames = [FRAMES[name]] if name in FRAMES else []
    assert made.shape == (2, *frames, 3, side, side)
    theirs = family.pipe(**call)
    assert farthest(made, theirs[family.output]) < BOUND


@families
def test_a_prompt_in_a_batch_is_the_prompt_alone(name):
    family = shared_family(name)
    network, noise, t = FamilyNetwork(family), noise_of(family), torch.tensor([0.7, 0.7])
    with torch.no_grad():
        together = network(noise, t, family.encode(prompts_of(name)))
        for row, prompt in enumerate(prompts_of(name)):
            alone = family.encode([prompt])
            v = network(noise[row : row + 1], t[:1], alone)
            assert farthest(v[0], together[row]) < BOUND


@families
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_in_the_stock_pipeline_is_what_we_generate(name, steps):
    """Its LoRA at strength 1, its scheduler and its call."""
    family = make_family(name)
    cond, noise = family.encode(prompts_of(name)), noise_of(family)
    backbone = backbone_of(family, rank=2)
    draw_adapter(backbone.adapters, "student", seed=3)
    with torch.no_grad():
        backbone.adapters.parameters_of("student")[0].mul_(3)
    backbone.refresh("student")
    if steps < family.least_steps:
        with pytest.raises(ValueError, match="must be at least 2 for MochiPipeline"):
            student_sampler(family, cond, steps)
        return
    sampler = student_sampler(family, cond, steps)
    config = DistillConfig(student_steps=steps, guidance=family.guidance)
    distiller = make_distiller(backbone, config, schedule=sampler.schedule)
    with pytest.warns(UserWarning, match="still what it started as"):
        ours = distiller.generate(noise, cond)

    state = backbone.adapters.adapter_state_dict("student", prefix="")
    teacher = family.pipe
    if (name, steps) not in NO_SINGLE:
        without = their_record(name, family, noise, steps, **off(sampler)).end
    load_lora(family, state)
    teacher.scheduler = sampler.scheduler or teacher.scheduler
    theirs = their_record(name, family, noise, steps, **off(sampler))
    assert theirs.schedule == sampler.schedule
    assert farthest(ours, theirs.end) < BOUND
    assert steps == 1 or min(sampler.schedule.nodes[:-1]) > 0.12  # no last step next to 0
    # The LoRA does something.
    assert (name, steps) in NO_SINGLE or not farthest(without, theirs.end) < 10 * BOUND


def load_lora(family, state):
    """Into the pipeline, a network at a time, as diffusers' loaders take it."""
    if not family.takes_lora:
        names = {key.rpartition(".lora")[0] for key in state}
        both = {x: tuple(state[f"{x}.lora_{side}.weight"].float() for side in "AB") for x in names}
        factors = {name.partition(".")[2]: pair for name, pair in both.items()}
        merge_lora(family.pipe.transformer, Lora(factors))
        return
    for network in family.networks:
        own = {
            key.replace(network, "transformer", 1): factor
            for key, factor in state.items()
            if key.startswith(f"{network}.")
        }
        second = {"load_into_transformer_2": True} if network == "transformer_2" else {}
        if hasattr(family.pipe, "load_lora_weights"):
            family.pipe.load_lora_weights(own, **second)
        else:
            family.pipe.transformer.load_lora_adapter(own)


def off(sampler):
    return {name: value for name, value in sampler.call.items() if name != "num_inference_steps"}


def test_prompts_of_several_lengths_are_each_the_prompt_alone():
    """Of OmniGen's own batch all rows have the positions of the first: another result."""
    family = shared_family("omnigen")
    noise, backbone = noise_of(family), backbone_of(family, rank=2)
    schedule = student_sampler(family, family.encode(PROMPTS), 2).schedule
    ours = teacher_samples(backbone, family.encode(PROMPTS), noise, schedule, family.guidance)
    for row, prompt in enumerate(PROMPTS):
        alone = record_call(family, noise[row : row + 1], 2, prompt=[prompt]).end
        assert farthest(ours[row], alone[0]) < BOUND
    assert farthest(ours, record_call(family, noise, 2, prompt=PROMPTS).end) > 10 * BOUND


def test_every_adapter_is_short_and_registered():
    from pathlib import Path

    import diffusers

    import mfd_fast.models.diffusers.family as module

    folder = Path(module.__file__).parent
    for pipeline, name in FAMILIES.items():
        assert hasattr(diffusers, pipeline)
        assert len((folder / f"{name.split(':')[0]}.py").read_text().splitlines()) <= 130


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein", "kandinsky5-t2i", "kandinsky5-t2v"])
def test_a_network_of_two_pipelines_says_whose_it_is(name):
    pipe = tiny_pipeline(name)
    assert type(pipeline_around(pipe.transformer, pipe.scheduler, pipe.vae)) is type(pipe)


def test_what_is_refused_by_name():
    for name, why in {
        "PixArtSigmaPipeline": "is no flow model",
        "StableDiffusionXLPipeline": "is no flow model",
        "CogVideoXPipeline": "is no flow model",
        "LongCatImagePipeline": "has no adapter",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{why}|{why}.*{name}"):
            family_of(type(name, (), {})())
    klein, krea = (PIPELINES[name](is_distilled=True) for name in ("flux2-klein", "krea2"))
    for pipe in (klein, krea):
        with pytest.raises(ValueError, match=r"distilled already.*the base checkpoint"):
            family_of(pipe)
    image, sparse = shared_family("kandinsky5-t2i").pipe, tiny_pipeline("kandinsky5-t2v")
    with pytest.raises(ValueError, match=r"one of 64x64 for Kandinsky5T2I.* would change 64x80"):
        family_of(image, height=64, width=80)
    sparse.transformer.register_to_config(attention_type="nabla")
    with pytest.raises(ValueError, match=r"attention is 'nabla'.*those of 5 seconds"):
        family_of(sparse, **tiny_size("kandinsky5-t2v"))
    family = shared_family("cogview4")
    with pytest.raises(ValueError, match=r"takes texts of one length, got lengths \[16, 64\]"):
        record(family, family.encode(PROMPTS), noise_of(family), 1)
    hidream = shared_family("hidream").pipe
    with pytest.raises(ValueError, match="asked for 64 x 64 it makes 128 x 128"):
        family_of(hidream, height=64, width=64)
    with pytest.raises(ValueError, match=r"multiples of 16 for StableDiffusion3.*64 x 60"):
        family_of(shared_family("sd3").pipe, height=64, width=60)
