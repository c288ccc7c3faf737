"""The whole step on a SharedBackbone: trains adapters only, eager, captured and continued."""

import copy

import pytest
import torch
from no_sync import NoSync
from recorded_graph import RecordedGraph
from small_networks import (
    ALPHA,
    NETWORKS,
    RANK,
    SAMPLE_SHAPE,
    TARGETS,
    image_inputs,
    null_text,
)

from mfd_fast import AdapterBank, DistillConfig, Distiller, OptimConfig, SharedBackbone
from mfd_fast.distill.captured import CapturedDistiller


def make_distiller(kind="plain", dtype=torch.float32, cls=Distiller, **overrides):
    torch.manual_seed(2)
    network = NETWORKS[kind]().to(dtype)
    bank = AdapterBank(network, rank=RANK, alpha=ALPHA, targets=TARGETS)
    backbone = SharedBackbone(
        network, adapters=bank, sample_shape=SAMPLE_SHAPE, null_cond=null_text
    )
    optim = OptimConfig(lr=1e-2)
    config = DistillConfig(
        **{"guidance": 2.0, "step_size": 0.2, "aux_updates": 2, "ema_decay": 0.5,
           "student_optim": optim, "aux_optim": optim} | overrides
    )  # fmt: skip
    return cls(backbone, config, **({} if cls is Distiller else {"graph": RecordedGraph}))


def flat_factors(backbone, role):
    pairs = backbone.adapters.factors(role).values()
    return torch.cat([x.flatten() for pair in pairs for x in pair])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["mfd", "vsd"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_distiller_trains_the_adapters_and_nothing_else(kind, objective, dtype):
    distiller = make_distiller(kind, dtype, objective=objective, student_steps=2)
    backbone = distiller.backbone
    frozen = copy.deepcopy(backbone.network.state_dict())
    before = {role: backbone.parameters_of(role)[0].detach().clone() for role in ("aux", "student")}
    for _ in range(6):
        distiller.step(image_inputs(3)[2])
    assert distiller.num_updates == {"aux": 4, "student": 2} and distiller.skipped.item() == 0
    for role, old in before.items():
        (master,) = backbone.parameters_of(role)
        assert not torch.equal(master, old)
        assert torch.equal(flat_factors(backbone, role), master.detach().to(dtype))
    for key, value in backbone.network.state_dict().items():
        assert torch.equal(value, frozen[key]), key


def test_fixed_point_is_exactly_zero():
    """New adapters do nothing and w = 1: teacher and auxiliary see the same numbers."""
    distiller = make_distiller(guidance=1.0)
    metrics = distiller.student_step(image_inputs(3)[2])
    assert metrics["student_grad_norm"].item() == 0.0 and metrics["distance"].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_weights_are_swapped_in_and_out(dtype):
    distiller = make_distiller(dtype=dtype)
    for _ in range(6):
        distiller.step(image_inputs(3)[2])
    backbone = distiller.backbone
    x, _, cond = image_inputs(3)
    now = flat_factors(backbone, "student").clone()
    raw = distiller.generate(x, cond, use_ema=False)
    with distiller.averaged_student():
        assert torch.equal(flat_factors(backbone, "student"), distiller.ema[0].to(dtype))
    assert not torch.equal(raw, distiller.generate(x, cond))
    assert torch.equal(flat_factors(backbone, "student"), now)
    assert torch.equal(raw, distiller.generate(x, cond, use_ema=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_for_bit(dtype):
    conds = [image_inputs(3)[2] for _ in range(6)]
    one, two = make_distiller(dtype=dtype), make_distiller(dtype=dtype, seed=5)
    for cond in conds[:3]:
        one.step(cond)
    two.load_state_dict(one.state_dict())
    for cond in conds[3:]:
        a, b = one.step(cond), two.step(cond)
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NETWORKS)
def test_captured_phases_equal_eager_ones(kind, dtype):
    """Replayed operators see the masters, copies and prepared rows where they are."""
    eager = make_distiller(kind, dtype, student_steps=2)
    captured = make_distiller(kind, dtype, CapturedDistiller, student_steps=2)
    for _ in range(24):
        cond = image_inputs(3)[2]
        expected, got = eager.step(cond), captured.step(cond)
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    for role in ("aux", "student"):
        assert torch.equal(*(flat_factors(d.backbone, role) for d in (eager, captured)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_no_host_sync_in_a_step(kind, monkeypatch):
    distiller = make_distiller(kind, torch.bfloat16)
    tables = [distiller.objective.draw(3, distiller.host_generator) for _ in range(2)]
    monkeypatch.setattr(distiller.objective, "draw", lambda *_: tables.pop())
    cond = image_inputs(3)[2]
    for _ in range(3):
        distiller.step(cond)
    with NoSync():
        for _ in range(3):
            distiller.step(cond)
