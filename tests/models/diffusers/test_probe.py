"""The start-up probe passes on the installed diffusers, and hears planted changes."""

import pytest
import torch
from tiny_pipelines import PIPELINES, tiny_pipeline, tiny_size

from mfd_fast.models.diffusers.family import family_of
from mfd_fast.models.diffusers.probe import probe

PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow under the stars"]


BF16 = (
    *("sd3", "flux1-dev", "qwen-image", "z-image", "lumina2", "wan", "cosmos2"),
    "kandinsky5-t2v",
)


def probed(name, change=None, dtype=torch.float32):
    """The probe of a family whose pipeline or adapter was changed after it was made."""
    family = family_of(tiny_pipeline(name), **tiny_size(name))
    cond = family.encode(PROMPTS)
    family.null_row = family.null_row or family.encode_null() if family.has_null else None
    if dtype != torch.float32:
        family.pipe.transformer.to(dtype)
        for row in (cond, family.null_row or {}):
            row |= {k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()}
    if change is not None:
        change(family)
    probe(family, cond)


@pytest.mark.parametrize("name", PIPELINES)
def test_it_passes_on_what_is_installed(name):
    probed(name)


@pytest.mark.parametrize("name", BF16)
def test_it_passes_in_bf16(name):
    probed(name, dtype=torch.bfloat16)


def other_clock(family):
    family.pipe.scheduler.register_to_config(num_train_timesteps=1)


def negated_step(family):
    step = family.pipe.scheduler.step
    family.pipe.scheduler.step = lambda v, *args, **kwargs: step(-v, *args, **kwargs)


def other_scale(family):
    kind = type(family.pipe)

    def call(self, *args, guidance_scale, **kwargs):
        return kind.__call__(self, *args, guidance_scale=guidance_scale + 1, **kwargs)

    family.pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def third_lane(family):
    family.extra = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0}


def linear(family):
    family.combine = None


PLANTED = {
    "time": ("sd3", other_clock, r"timestep 1, not 1000"),
    "calls": ("sd3", third_lane, r"evaluates 3 rows in a step of one image, not 2"),
    "guidance": ("aura-flow", other_scale, r"guidance_scale 3.5 the guided velocity .* differs"),
    "of x_0": ("cosmos2", other_scale, r"guidance_scale 7 the guided velocity .* differs"),
    "renormalised": ("qwen-image", linear, r"true_cfg_scale 4 the guided velocity .* differs"),
    "embedded": ("flux1-dev", other_scale, r"called with guidance 4\.5, not 3\.5"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_change_is_a_sentence(what):
    name, change, sentence = PLANTED[what]
    with pytest.raises(ValueError, match=sentence) as error:
        probed(name, change)
    assert str(error.value).startswith(f"{type(tiny_pipeline(name)).__name__} of diffusers ")
    assert "Install diffusers 0.42.1" in str(error.value)


def claims(name, **methods):
    """The probe of an adapter that claims something else, as if diffusers had moved."""

    def change(family):
        family.__class__ = type("Changed", (type(family),), methods)

    probed(name, change)


def test_what_an_adapter_claims_and_the_pipeline_does_not():
    lumina = family_of(tiny_pipeline("lumina2"), height=64, width=64)

    def positive(self, *args):
        return -type(lumina).velocity(self, *args)

    with pytest.raises(ValueError, match="opposite sign"):
        claims("lumina2", velocity=positive)
    with pytest.raises(ValueError, match=r"Lumina2Pipeline.* its call fails .*KeyError: 'mask'"):
        claims("lumina2", null=lambda self, cond: {"text": cond["text"]})

    def told_nothing(self, transformer, x, t, cond):
        return transformer(
            **{"hidden_states": x, "timestep": t, "encoder_hidden_states": cond["text"]},
            **{"pooled_projections": cond["pooled"], "return_dict": False},
            **self.ids(x, cond["text"]),
        )[0]

    with pytest.raises(ValueError, match=r"network is called with guidance 3\.5, not None"):
        claims("flux1-dev", velocity=told_nothing)

    def other_text(self, transformer, x, t, cond):
        return transformer(
            **{"hidden_states": x, "timestep": 1000 * t, "return_dict": False},
            **{"encoder_hidden_states": 2 * cond["text"]},
            **self.ids(x, cond["text"]),
        )[0]

    with pytest.raises(ValueError, match=r"encoder_hidden_states of shape .* not of shape"):
        claims("bria", velocity=other_text)
