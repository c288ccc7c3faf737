"""What the condition alone decides is computed once a trajectory: the same results, less work."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import PIPELINES
from tiny_runs import made

from mfd_fast import AUX, STUDENT, TEACHER, TEACHER_UNCOND
from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.models import preset
from mfd_fast.models.diffusers.shapes import outlined
from mfd_fast.testing.counting import Count, torchs_counter
from mfd_fast.testing.numerics import assert_as_accurate

PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow under the stars"]
TIMES = torch.tensor([0.9, 0.4])


def rows_of(family):
    lanes = (TEACHER, TEACHER_UNCOND, AUX) if family.guidance != 1.0 else (TEACHER, AUX)
    draws = torch.Generator().manual_seed(1)
    return torch.randn(2, len(lanes), *family.sample_shape, generator=draws), lanes


def whole(backbone):
    """Every evaluation runs the whole network from now on."""
    backbone.network.prepare = lambda cond: cond
    return backbone


@pytest.mark.parametrize("name", PIPELINES)
def test_evaluations_equal_those_of_the_whole_network_bit_for_bit(name):
    family, backbone, cond = made(name, PROMPTS)
    x, lanes = rows_of(family)
    found = []
    for _ in range(2):
        with torch.no_grad():
            prepared = backbone.prepare(cond)
            found.append(backbone.forward(x, TIMES, prepared, lanes))
            found.append(backbone.forward(x[:, :1], TIMES, prepared, (TEACHER,)))
            found.append(backbone.forward(x, TIMES, prepared, lanes))
        whole(backbone)
    assert torch.equal(found[0], found[2])
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))


def gradient(backbone, cond, x):
    """Of two evaluations of the student with one prepared condition."""
    prepared = backbone.prepare(cond)
    v = backbone.forward(x, TIMES.to(x.dtype), prepared, (STUDENT,))
    v = backbone.forward(v, TIMES.to(x.dtype) / 2, prepared, (STUDENT,))
    (grad,) = torch.autograd.grad(v.square().mean(), backbone.parameters_of("student"))
    return grad


@pytest.mark.parametrize("activation", ["none", "block", "cheap"])
@pytest.mark.parametrize("name", ["wan", "sana", "ltx", "lumina2", "qwen-image"])
def test_the_student_gets_every_gradient(name, activation):
    """Of the text's keys and values too, which have adapters."""
    family, backbone, cond = made(name, PROMPTS, activation=activation)
    x = rows_of(family)[0][:, :1]
    ours, parts = gradient(backbone, cond, x), []
    wide = deepcopy(whole(backbone))
    eager = gradient(backbone, cond, x)
    wide.double().dtype = torch.float64
    leaves = {k: y.double() if y.is_floating_point() else y for k, y in cond.items()}
    exact = gradient(wide, leaves, x.double())
    for grad in (ours, eager, exact):
        pieces = backbone.adapters.adapters["student"].split(grad)
        parts.append([torch.cat([a.flatten(), b.flatten()]) for a, b in pieces])
    for mine, theirs, right in zip(*parts, strict=True):
        assert right.abs().max() > 0
        assert_as_accurate(mine, theirs, right)


def work(backbone, x, prepared, lanes):
    with torch.no_grad():
        backbone.forward(x, TIMES, prepared, lanes)  # makes the rows
        with torchs_counter() as flops, Count() as count:
            backbone.forward(x, TIMES, prepared, lanes)
    return flops.get_total_flops(), count.total


OWN_LENGTHS = ("cogview4", "kandinsky5-t2i", "kandinsky5-t2v")  # calls of their own, as they come


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in OWN_LENGTHS])
def test_an_evaluation_does_less(name):
    family, backbone, cond = made(name, PROMPTS)
    if not list(family.constants(family.pipe.transformer)):
        pytest.skip("this family names no constants")
    x, lanes = rows_of(family)
    flops, operators = work(backbone, x, backbone.prepare(cond), lanes)
    whole(backbone)
    all_flops, all_operators = work(backbone, x, backbone.prepare(cond), lanes)
    print(f"{name}: {flops} of {all_flops} FLOP, {operators} of {all_operators} operators")
    assert flops < all_flops
    assert operators < all_operators


@pytest.mark.parametrize("name", ["flux1-dev", "krea2", "sana", "wan"])
def test_they_can_be_made_inside_a_captured_update(name):
    family, backbone, cond = made(name, PROMPTS)
    x, lanes = rows_of(family)

    def step(_):
        with torch.no_grad():
            backbone.forward(x, TIMES, backbone.prepare(cond), lanes)

    step(0)
    assert check_capture_safe(step) > 0


@pytest.mark.parametrize(("frames", "are_kept"), [(1, True), (81, False)])
def test_keys_and_values_are_kept_where_they_are_worth_their_bytes(frames, are_kept):
    config = preset("wan2.1-1.3b")
    family = outlined(replace(config, pipeline=replace(config.pipeline, frames=frames)))
    names = {x.modules[0] for x in family.constants(family.pipe.transformer)}
    assert ("blocks.0.attn2.to_k" in names) == are_kept
    assert "condition_embedder.text_embedder" in names
