"""OccFM's fast path equals its reference path; the engine's view of it; what it costs."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from occfm_networks import (
    TINY,
    inputs,
    make_network,
    reference_forecast,
    reference_velocity,
    wide,
)
from recorded_graph import RecordedGraph

from mfd_fast import AdapterBank, CopiedBackbone, DistillConfig, Distiller, SharedBackbone
from mfd_fast.backbones.activation import apply_activation_policy
from mfd_fast.backbones.lanes import AUX, STUDENT, TEACHER, TEACHER_UNCOND, trajectory_lanes
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import scheduled
from mfd_fast.models.occfm import BLOCKS, CONFIGS, OccfmNetwork, forecast, null_condition
from mfd_fast.testing.counting import Count, Traffic
from mfd_fast.testing.numerics import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADAPTED = ("qkv", "attn.proj", "fc1", "fc2", "to_qkv", "to_out", "traj_encoder.0")
# The sampler's times in its own direction, as published to seven digits.
TIMES = [0, 0.0357143, 0.0769231, 0.125, 0.1818182, 0.25, 0.3333333, 0.4375, 0.5714286, 0.75, 1]


def make_copies(**kwargs):
    network = make_network()
    return CopiedBackbone(
        network, sample_shape=TINY.sample_shape, null_cond=null_condition, **kwargs
    )


@pytest.mark.parametrize(
    ("config", "dtype", "rows"),
    [
        *((TINY, dtype, 3) for dtype in DTYPES),
        (TINY, torch.float32, 1),
        (replace(TINY, trajectory_length=12), torch.float32, 2),
        (replace(TINY, latent_channels=1, grid=14), torch.float32, 2),
    ],
    ids=["fp32", "bf16", "fp16", "one row", "all ego steps", "one channel, larger"],
)
@torch.no_grad()
def test_forward_equals_the_reference(config, dtype, rows):
    network = make_network(config, dtype)
    x, t, cond = inputs(rows, network.config)
    x = x.to(dtype)
    v = network(x, t, cond)
    eager = reference_velocity(network, x, t, cond)
    assert_as_accurate(v, eager, reference_velocity(wide(network), x, t, cond))
    assert v.is_contiguous()
    assert torch.equal(network(x, t, network.prepare(cond)), v)


def gradients(network, velocity, x, t, cond, seed):
    """To x and every parameter, of the same random sum of the velocities."""
    x = x.to(network.dtype).requires_grad_()
    v = velocity(network, x, t, cond)
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((v * weight.to(v.dtype)).sum(), [x, *network.parameters()])


@pytest.mark.parametrize(
    ("dtype", "prepared"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=["fp32", "bf16", "fp16, not prepared"],
)
def test_gradients_equal_the_reference(dtype, prepared):
    """All 202 parameters and the input; every one counts as much as the others."""
    network = make_network(dtype=dtype)
    x, t, cond = inputs(2)
    x = x.to(dtype)

    def fast(net, x, t, cond):
        return net(x, t, net.prepare(cond) if prepared else cond)

    exact = gradients(wide(network), reference_velocity, x, t, cond, seed=1)
    ours, eager = (
        gradients(network, velocity, x, t, cond, seed=1) for velocity in (fast, reference_velocity)
    )
    scales = [grad.abs().max() for grad in exact]
    assert all(scales)

    def together(grads):
        parts = [(g / s.to(g.dtype)).flatten() for g, s in zip(grads, scales, strict=True)]
        return torch.cat(parts)

    assert_as_accurate(together(ours), together(eager), together(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_equals_the_reference_under_autocast(dtype):
    """Float32 weights, products in half precision; prepared rows are in half precision too."""
    network = make_network()
    args = inputs(2)
    exact = reference_velocity(wide(network), *args)
    with torch.autocast("cpu", dtype):
        eager = reference_velocity(network, *args)
    network.compute_dtype = dtype
    ours = network(*args)
    assert ours.dtype == dtype
    assert_as_accurate(ours.float(), eager.float(), exact)
    ours.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_recomputed_blocks_change_no_gradient():
    network = make_network()
    twin = copy.deepcopy(network)
    apply_activation_policy(twin, "block", BLOCKS)
    args = inputs(1)
    ours, theirs = (torch.autograd.grad(n(*args).sum(), n.parameters()) for n in (twin, network))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_what_a_forecast_does_not_change_is_computed_once():
    """Ten guided steps: both lanes' histories in one call, then their futures once a step."""
    network, calls = make_network(), []
    network.init_conv.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    embedder = []
    network.t_embedder.register_forward_hook(lambda _, args, out: embedder.append(len(args[0])))
    noise, _, cond = inputs(1)
    forecast(network, noise, cond)
    assert calls == [2 * 6] + 10 * [2 * 6]
    assert embedder == [10 * 2]  # all steps' modulations are one product


def test_the_schedule_is_the_published_one():
    nodes = make_network().schedule().nodes
    assert [round(1 - t, 7) for t in nodes] == TIMES
    assert make_network().schedule(1).nodes == (1.0, 0.0)


@cache
@torch.no_grad()
def expected_forecast(steps, guidance):
    """The reference sampler's, in float32 and float64, for ``inputs(2)``."""
    network = make_network()
    noise, _, cond = inputs(2)
    return [
        reference_forecast(net, noise, cond, steps=steps, guidance=guidance)
        for net in (network, wide(network))
    ]


@pytest.mark.parametrize(("steps", "guidance"), [(10, 2.0), (1, 2.0), (1, 1.0)])
def test_forecasts_equal_the_reference_sampler(steps, guidance):
    noise, _, cond = inputs(2)
    ours = forecast(make_network(), noise, cond, steps=steps, guidance=guidance)
    assert_as_accurate(ours, *expected_forecast(steps, guidance))


@pytest.mark.parametrize("steps", [10, 1])
@torch.no_grad()
def test_the_engine_samples_what_the_reference_sampler_does(steps):
    """Lanes of a backbone, the solver table and guidance, with the states in the engine's time."""
    backbone = make_copies()
    noise, _, cond = inputs(2)
    prepared = backbone.prepare(cond)
    lanes = (TEACHER, TEACHER_UNCOND)
    assert trajectory_lanes(TINY.guidance)[:2] == lanes
    ends = integrate(
        lambda x, t: backbone.forward(x, t, prepared, lanes),
        noise[:, None],
        scheduled(backbone.teacher.schedule(steps), 2),
        guidance=TINY.guidance,
        num_lanes=2,
    )[:, 0]
    assert_as_accurate(ends / TINY.latent_scale, *expected_forecast(steps, TINY.guidance))


@torch.no_grad()
def test_a_student_of_the_distiller_is_a_one_step_forecast():
    distiller = Distiller(make_copies(), DistillConfig(guidance=2.0, student_steps=1))
    noise, _, cond = inputs(2)
    ours = distiller.generate(noise, cond) / TINY.latent_scale
    assert_as_accurate(ours, *expected_forecast(1, 1.0))


def test_copies_prepare_once_per_role_and_trajectory():
    backbone, counts = make_copies(), {"teacher": 0, "aux": 0, "student": 0}
    for role in counts:
        module = getattr(backbone, role).traj_encoder

        def hook(*_, role=role):
            counts[role] += 1

        module.register_forward_hook(hook)
    x, t, cond = inputs(2)
    prepared = backbone.prepare(cond)
    with torch.no_grad():
        for n in (2, 2, 1):
            lanes = x[:n, None].expand(-1, 3, *x.shape[1:])
            backbone.forward(lanes, t[:n], prepared, (TEACHER, TEACHER_UNCOND, AUX))
    assert counts == {"teacher": 1, "aux": 1, "student": 0}
    v = backbone.forward(x[:, None], t, prepared, (AUX,))
    v.sum().backward()
    assert counts["aux"] == 2  # with gradient they are others
    assert backbone.aux.traj_encoder[0].weight.grad.any()
    assert backbone.aux.init_conv.weight.grad.any()


def merged(network, bank, role, dtype):
    """The network with the adapter of a role in its weights; none for the teacher."""
    plain = OccfmNetwork(network.config).to(dtype)
    plain.load_state_dict(network.state_dict())
    for name, (a, b) in bank.factors(role).items() if role != "teacher" else ():
        plain.get_parameter(f"{name}.weight").add_(bank.scale(role) * b.to(dtype) @ a.to(dtype))
    return plain


@torch.no_grad()
def test_adapters_reach_the_rows_of_their_lanes_only():
    """A packed batch of all lanes equals the networks with the adapters merged, one by one."""
    network = make_network()
    bank = AdapterBank(network, rank=4, targets=ADAPTED)
    for name in bank.names:
        bank.parameters_of(name)[0].normal_(std=0.05)  # 0.1 amplifies roundings a thousandfold
        bank.refresh(name)
    backbone = SharedBackbone(
        network, adapters=bank, sample_shape=TINY.sample_shape, null_cond=null_condition
    )
    x, t, cond = inputs(2)
    lanes = (TEACHER, TEACHER_UNCOND, AUX, STUDENT)
    states = x[:, None].expand(-1, len(lanes), *x.shape[1:])
    packed = backbone.forward(states, t, backbone.prepare(cond), lanes)
    for lane, ours in zip(lanes, packed.unbind(1), strict=True):
        condition = cond if lane.is_conditional else null_condition(cond)
        eager, exact = (
            reference_velocity(merged(network, bank, lane.role, dtype), x, t, condition)
            for dtype in (torch.float32, torch.float64)
        )
        assert_as_accurate(ours, eager, exact)


def test_forward_and_backward_can_be_captured():
    network, calls = make_network(), [inputs(2, seed=seed) for seed in range(2)]

    def step(i):
        torch.autograd.grad(network(*calls[i]).sum(), network.parameters())

    assert check_capture_safe(step) > 0


def test_recorded_replay_equals_eager_bit_for_bit():
    """The whole step with prepared rows: distillation of full copies, eager and captured."""
    config = DistillConfig(guidance=2.0, step_size=1.0, student_steps=1, aux_updates=1)
    eager = Distiller(make_copies(), config)
    captured = CapturedDistiller(make_copies(), config, graph=RecordedGraph)
    for seed in range(8):
        _, _, cond = inputs(1, seed=seed)
        expected, got = eager.step(cond), captured.step(cond)
        assert all(torch.equal(expected[k], got[k]) for k in expected), seed
    assert captured.num_graphs > 0  # it did capture


@torch.no_grad()
def test_an_ode_step_costs_two_fifths_of_the_operators_and_three_fifths_of_the_bytes():
    """Counted at the published widths and a smaller grid: prepared, as in a forecast."""
    config = replace(CONFIGS["occfm"], grid=20)
    network = OccfmNetwork(config)
    x, t, cond = inputs(1, config)
    prepared = network.prepare(cond)
    prepared["modulation"] = network.modulation(t, prepared["trajectory_embedding"])
    counts = {}
    for name, call in {
        "fast": lambda: network(x, t, prepared),
        "reference": lambda: reference_velocity(network, x, t, cond),
    }.items():
        with Count() as count, Traffic() as traffic:
            call()
        counts[name] = (count.total, traffic.bytes)
    operators, moved = zip(counts["fast"], counts["reference"], strict=True)
    assert operators[0] <= 0.4 * operators[1], operators
    assert moved[0] <= 0.6 * moved[1], moved
