"""Families whose attentions rotate as they norm: the same numbers by fewer operators."""

import copy
import inspect

import pytest
import torch
from small_networks import draw_adapter
from tiny_pipelines import tiny_pipeline, tiny_size
from torch import nn

from mfd_fast import STUDENT, TEACHER
from mfd_fast.models.diffusers import backbone as backbones
from mfd_fast.models.diffusers.family import family_of
from mfd_fast.models.diffusers.rotary import PROCESSORS, fuse_rotary
from mfd_fast.testing.counting import Count
from mfd_fast.testing.numerics import assert_as_accurate

# Family -> attentions that rotate, of its tiny network, and operators that each saves.
FUSED = {
    "flux1-dev": 4,
    "flux2-dev": 4,
    "chroma": 4,
    "bria": 4,
    "qwen-image": 2,
    "z-image": 4,
    "lumina2": 4,
    "wan": 2,
    "ltx": 2,
}
OP = "rms_norm_rotary"
LANES = (TEACHER, STUDENT)
families = pytest.mark.parametrize("name", FUSED)


def made(name, monkeypatch, *, fused, dtype=torch.float32):
    """A backbone with drawn adapters, its inputs for two lanes, and their condition."""
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr(backbones, "fuse_rotary", lambda network: 0)
        family = family_of(tiny_pipeline(name), **tiny_size(name))
        backbone = backbones.backbone_of(family, rank=2)
    for seed, adapter in enumerate(("aux", "student")):
        draw_adapter(backbone.adapters, adapter, seed)
    cond = family.encode(["a red fox"])
    if dtype == torch.float64:
        backbone.double().dtype = dtype
        cond = {k: x.double() if x.is_floating_point() else x for k, x in cond.items()}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, *family.sample_shape, generator=generator).repeat(
        1, 2, *[1] * len(family.sample_shape)
    )
    return backbone, x.to(dtype), cond


def run(backbone, x, cond):
    """Velocities without gradient, then the student's with it: v, and what the adapters get."""
    t, prepared = torch.full(x.shape[:1], 0.7), backbone.prepare(cond)
    with torch.no_grad():
        v = backbone(x, t, prepared, LANES)
    own = backbone(x[:, :1], t, prepared, LANES[1:])
    (grad,) = torch.autograd.grad(own.square().sum(), backbone.parameters_of("student"))
    return v, own.detach(), grad


@families
def test_equal_with_adapters_and_gradient(name, monkeypatch):
    ours, stock = (run(*made(name, monkeypatch, fused=fused)) for fused in (True, False))
    exact = run(*made(name, monkeypatch, fused=True, dtype=torch.float64))
    for one, two, three in zip(ours, stock, exact, strict=True):
        assert_as_accurate(one, two, three.double())
        assert_as_accurate(two, one, three.double())  # the exact one is theirs, too


@families
def test_operators_of_a_block(name, monkeypatch):
    counts = []
    for fused in (True, False):
        backbone, x, cond = made(name, monkeypatch, fused=fused)
        run(backbone, x, cond)
        with Count() as count:
            run(backbone, x, cond)
        counts.append(count)
    ours, stock = counts
    # Queries and keys, of the text too where it has its own, forward, twice, and backward.
    assert ours.ops[OP] % (2 * FUSED[name]) == 0
    # Those of a first block's text have no adapter behind them in most families.
    backward, forward = (ours.ops[name] for name in ("_rms_norm_rotary_backward", OP))
    assert forward // 2 - 2 <= backward <= forward // 2
    assert (stock.total - ours.total) / FUSED[name] >= 3 * 3


@families
def test_every_attention_that_rotates_is_fused(name):
    pipe = tiny_pipeline(name)
    assert fuse_rotary(pipe.transformer) >= FUSED[name]
    assert fuse_rotary(copy.deepcopy(pipe.transformer)) == 0
    for module in pipe.transformer.modules():
        processor = getattr(module, "processor", None)
        assert type(processor).__name__ not in PROCESSORS
        if type(processor).__name__.startswith("Fused"):
            stock = type(processor).__mro__[1]
            ours, theirs = (inspect.signature(p.__call__) for p in (processor, stock()))
            assert ours == theirs


def test_a_norm_of_another_kind_stays():
    class Attention(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.to_q, self.norm_q, self.norm_k = nn.Linear(2, 2), norm, nn.RMSNorm(2)
            self.processor = type("WanAttnProcessor", (), {})()

    kept = nn.LayerNorm(2), nn.Identity()
    assert [fuse_rotary(Attention(norm)) for norm in kept] == [0, 0]
