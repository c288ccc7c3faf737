"""Guidance that is not linear: a network's ``combine`` in place of v_u + w (v_c - v_u)."""

import pytest
import torch
from recorded_graph import RecordedGraph
from small_networks import SAMPLE_SHAPE, TEXT, WIDTH, ImageNetwork, draw_adapter

from mfd_fast import (
    CapturedDistiller,
    CopiedBackbone,
    DistillConfig,
    Distiller,
    SharedBackbone,
    guided,
    mean_velocity,
)
from mfd_fast.backbones.lanes import TEACHER, TEACHER_UNCOND, guided_lanes
from mfd_fast.baselines.batch import Fields
from mfd_fast.testing.numerics import assert_as_accurate

W = 4.0


class Renormalised(ImageNetwork):
    """Guided velocities keep the norm of the conditional one, per row of pixels."""

    def combine(self, v_cond, v_uncond, w):
        v = v_uncond + w * (v_cond - v_uncond)
        return v * v_cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)


def null_cond(cond):
    return {"text": torch.zeros_like(cond["text"])}


def shared(network):
    backbone = SharedBackbone(network, sample_shape=SAMPLE_SHAPE, null_cond=null_cond)
    for seed, name in enumerate(("aux", "student")):
        draw_adapter(backbone.adapters, name, seed)
    return backbone


def copied(network):
    return CopiedBackbone(network, sample_shape=SAMPLE_SHAPE, null_cond=null_cond)


def batch(rows=3):
    return {"text": torch.randn(rows, TEXT, WIDTH)}, torch.randn(rows, *SAMPLE_SHAPE)


def literal(network, cond, dtype):
    """The guided teacher by hand."""
    cond = {"text": cond["text"].to(dtype)}
    network = network.to(dtype)

    def velocity(x, t):
        return network.combine(network(x, t, cond), network(x, t, null_cond(cond)), W)

    return velocity


@pytest.mark.parametrize("make", [shared, copied])
def test_the_teacher_is_combined_in_every_step(make):
    network = Renormalised()
    backbone = make(network)
    cond, x = batch()
    distiller = Distiller(backbone, DistillConfig(guidance=W, step_size=0.25))
    table = distiller.objective.draw(3, torch.Generator().manual_seed(1))
    t = table.times[0]
    r = t - table.span * table.start_weight
    ends = []
    integrate_loss = distiller.objective.loss
    distiller.objective.loss = lambda x_t, both, *rest: (
        ends.append(both) or integrate_loss(x_t, both, *rest)
    )
    noise = torch.randn_like(x)
    distiller.objective.student_loss(backbone, backbone.prepare(cond), x, noise, table)
    x_t = distiller.objective.noised(x, noise, t)
    ours = (x_t - ends[0][:, 0]) / table.span.view(-1, 1, 1, 1)

    def separate(dtype):
        velocity = literal(network, cond, dtype)
        arguments = (x_t.to(dtype), t.to(dtype), r.to(dtype))
        return mean_velocity(velocity, *arguments, step_size=0.25)

    eager = separate(torch.float32)
    assert_as_accurate(ours, eager, separate(torch.float64))
    linear = guided(lambda *a: network(*a, cond), lambda *a: network(*a, null_cond(cond)), W)
    network.float()
    assert (mean_velocity(linear, x_t, t, r, step_size=0.25) - eager).abs().max() > 0.1


def test_the_compared_methods_are_guided_by_it_too():
    network, (cond, x) = Renormalised(), batch()
    backbone, t = copied(network), torch.full((3,), 0.6)
    ours = Fields(backbone, backbone.prepare(cond), W).teacher(x, t)
    with torch.no_grad():
        eager, exact = (
            literal(network, cond, dtype)(x.to(dtype), t.to(dtype))
            for dtype in (torch.float32, torch.float64)
        )
    assert_as_accurate(ours, eager, exact)


def test_captured_updates_combine_as_eager_ones_do():
    config = DistillConfig(guidance=W, step_size=0.25, aux_updates=1)
    runs = {}
    for kind, options in ((Distiller, {}), (CapturedDistiller, {"graph": RecordedGraph})):
        torch.manual_seed(0)
        distiller = kind(shared(Renormalised()), config, **options)
        for seed in range(10):
            torch.manual_seed(seed)
            distiller.step(batch()[0])
        runs[kind] = distiller.state_dict()["student"][0]
    assert torch.equal(*runs.values())


def test_without_combine_nothing_is_added():
    backbone, (cond, x) = shared(ImageNetwork()), batch()
    made = torch.zeros(3, 2, *SAMPLE_SHAPE)
    backbone.forward = lambda *_: made
    lanes, t = (TEACHER, TEACHER_UNCOND), torch.rand(3)
    assert backbone.combine is None
    assert guided_lanes(backbone, x[:, None], t, backbone.prepare(cond), lanes, W) is made
