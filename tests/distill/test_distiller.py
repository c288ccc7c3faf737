"""The step: gradients against separate evaluation, fixed point, collapse, skip, state, no sync."""

import pytest
import torch
from gaussian import GaussianNetwork
from no_sync import NoSync

from mfd_fast import (
    CopiedBackbone,
    DistillConfig,
    Distiller,
    OptimConfig,
    interpolate,
    mean_velocity,
    mfd_loss,
)

DIM = 3


class CondNetwork(torch.nn.Module):
    """A small non-linear network whose output depends on its condition ``[B, 1]``."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(DIM + 2, 16)
        self.outer = torch.nn.Linear(16, DIM)

    def forward(self, x, t, cond):
        t = t.to(x.dtype)[:, None]
        return self.outer(torch.tanh(self.inner(torch.cat([x, t, cond.to(x.dtype)], dim=1))))


def cond_backbone(dtype=torch.float32):
    networks = [CondNetwork().to(dtype) for _ in range(3)]
    return CopiedBackbone(*networks, sample_shape=(DIM,), null_cond=torch.zeros_like)


def gaussian_backbone(teacher, student=None, aux=None):
    return CopiedBackbone(teacher, aux, student, sample_shape=(DIM,))


def test_fixed_point_is_exactly_zero():
    """v_A == v_T and w = 1: both trajectories see the same numbers, so the gradient is exactly
    0.
    """
    network = CondNetwork()
    backbone = CopiedBackbone(network, sample_shape=(DIM,))
    distiller = Distiller(backbone, DistillConfig(guidance=1.0, student_optim=OptimConfig(lr=1.0)))
    before = [p.clone() for p in backbone.parameters_of("student")]
    metrics = distiller.student_step(torch.randn(6, 1))
    assert metrics["student_grad_norm"].item() == 0.0 and metrics["distance"].item() == 0.0
    weight_decay = 1 - distiller.config.student_optim.weight_decay
    for old, new in zip(before, backbone.parameters_of("student"), strict=True):
        assert torch.equal(new, old * weight_decay)


class AffineGenerator(torch.nn.Module):
    """A student whose one step gives shift + scale z (the flow of a Gaussian gives only its
    mean).
    """

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(DIM))
        self.shift = torch.nn.Parameter(torch.zeros(DIM))

    def forward(self, x, t, cond):
        return x - (self.shift + self.scale * x)


def distil_gaussian(config, updates, batch=512):
    torch.manual_seed(0)
    teacher, student, aux = GaussianNetwork(), AffineGenerator(), GaussianNetwork(0.0, 1.0)
    distiller = Distiller(gaussian_backbone(teacher, student, aux), config)
    cond = torch.zeros(batch, 1)
    while distiller.num_updates["student"] < updates:
        distiller.step(cond)
    return distiller.generate(torch.randn(20_000, DIM), torch.zeros(20_000, 1))


@pytest.mark.parametrize("objective", ["mfd", "vsd"])
def test_student_of_a_gaussian_teacher_reaches_its_distribution(objective):
    """Teacher N(.3, .5^2), student starts at N(0, 1): it ends nearer than a tenth of the way."""
    optim = OptimConfig(lr=0.02, weight_decay=0.0)
    config = DistillConfig(
        objective=objective, guidance=1.0, aux_updates=2, student_optim=optim, aux_optim=optim,
        step_size=0.1, ema_decay=0.95,
    )  # fmt: skip
    x = distil_gaussian(config, updates=250)
    assert (x.mean(0) - 0.3).abs().max() < 0.03
    assert (x.std(0) - 0.5).abs().max() < 0.05


def test_without_an_auxiliary_the_student_collapses():
    """v_A replaced by eps - x_0: the variance of the samples goes to ~0 (paper C.4)."""
    torch.manual_seed(0)
    teacher = GaussianNetwork().requires_grad_(False)
    scale, shift = torch.ones(DIM, requires_grad=True), torch.zeros(DIM, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=0.02)
    for _ in range(400):
        x0 = shift + scale * torch.randn(256, DIM)
        eps, t, r = torch.randn(256, DIM), torch.full((256,), 0.7), torch.full((256,), 0.3)
        x_t = interpolate(x0, eps, t)
        u_teacher = mean_velocity(lambda x, t: teacher(x, t, 0.0), x_t, t, r, step_size=0.1)
        mfd_loss(x_t, u_teacher, (eps - x0).detach()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (shift + scale * torch.randn(10_000, DIM)).var().item() < 0.01 * 0.5**2


def small_distiller(**overrides):
    torch.manual_seed(1)
    config = DistillConfig(**{"guidance": 2.0, "step_size": 0.2, "aux_updates": 2} | overrides)
    return Distiller(cond_backbone(), config)


def test_cost_is_the_sum_of_the_steps():
    """Batch 8 with mixed N: 3 lanes x sum of N evaluations, not 3 x 8 x max N."""
    backbone = cond_backbone()
    distiller = Distiller(backbone, DistillConfig(guidance=4.5, step_size=0.02))
    table = distiller.objective.draw(8, torch.Generator().manual_seed(0))
    lanes = []
    forward = backbone.forward

    def counted(x, t, prepared, which):
        lanes.append(x.shape[0] * x.shape[1])
        return forward(x, t, prepared, which)

    backbone.forward = counted
    prepared = backbone.prepare(torch.randn(8, 1))
    x0, noise = torch.randn(8, DIM), torch.randn(8, DIM)
    distiller.objective.student_loss(backbone, prepared, x0, noise, table)
    steps = [sum(n > i for n in table.active) for i in range(8)]  # N of every sample
    assert len(set(steps)) > 4
    assert sum(lanes) == 3 * sum(steps) == 3 * table.num_evaluations


def test_loss_scale_backs_off_when_a_gradient_overflows():
    distiller = small_distiller(loss_scale=float(torch.finfo(torch.float32).max))
    before = [p.detach().clone() for p in distiller.backbone.parameters_of("aux")]
    scale = distiller.loss_scale["aux"].scale.clone()
    distiller.aux_step(1e4 * torch.randn(2, 1))
    assert distiller.skipped.item() == 1.0
    assert torch.equal(distiller.loss_scale["aux"].scale, scale / 2)
    after = distiller.backbone.parameters_of("aux")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_loss_scale_changes_no_gradient():
    """A power of two cancels exactly: the same update with and without it."""
    plain, scaled = small_distiller(), small_distiller(loss_scale=2.0**12)
    cond = torch.randn(4, 1)
    for distiller in (plain, scaled):
        distiller.aux_step(cond)
    pairs = zip(*(d.backbone.parameters_of("aux") for d in (plain, scaled)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_cycle_alternates_roles():
    distiller = small_distiller(aux_updates=2, student_updates=3)
    roles = []
    for _ in range(10):
        roles.append(distiller.next_role)
        distiller.step(torch.randn(2, 1))
    assert roles == (["aux"] * 2 + ["student"] * 3) * 2
    assert distiller.num_updates == {"aux": 4, "student": 6}


def test_state_dict_continues_bit_for_bit():
    conds = [torch.randn(3, 1) for _ in range(8)]
    one, two = small_distiller(ema_decay=0.9), small_distiller(ema_decay=0.9, seed=5)
    for cond in conds[:4]:
        one.step(cond)
    two.load_state_dict(one.state_dict())
    for cond in conds[4:]:
        a, b = one.step(cond), two.step(cond)
        assert all(torch.equal(a[k], b[k]) for k in a)
    for role in ("aux", "student"):
        pairs = zip(*(d.backbone.parameters_of(role) for d in (one, two)), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    with pytest.raises(ValueError, match="belongs to another network or config"):
        small_distiller().load_state_dict(one.state_dict())


def test_averaged_weights_follow_their_recurrence():
    distiller = small_distiller(ema_decay=0.75)
    expected = [p.detach().clone() for p in distiller.backbone.parameters_of("student")]
    for _ in range(6):
        role = distiller.next_role
        distiller.step(torch.randn(3, 1))
        if role == "student":
            now = distiller.backbone.parameters_of("student")
            expected = [torch.lerp(e, p.detach(), 0.25) for e, p in zip(expected, now, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(distiller.ema, expected, strict=True))
    noise, cond = torch.randn(4, DIM), torch.randn(4, 1)
    raw = distiller.generate(noise, cond, use_ema=False)
    averaged = distiller.generate(noise, cond)
    assert not torch.equal(raw, averaged)
    assert torch.equal(raw, distiller.generate(noise, cond, use_ema=False))  # weights came back


@pytest.mark.parametrize("role", ["aux", "student"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(role):
    distiller = small_distiller()
    parameters = distiller.backbone.parameters_of(role)
    before = [p.detach().clone() for p in parameters]
    getattr(distiller, f"{role}_step")(torch.full((2, 1), float("nan")))
    assert distiller.skipped.item() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert not distiller.optimizers[role].state_dict()["state"] or all(
        state["step"].item() == 0 for state in distiller.optimizers[role].state.values()
    )


@pytest.mark.parametrize("objective", ["mfd", "vsd"])
def test_no_host_sync_in_a_step(objective, monkeypatch):
    """Times are planned on the host from host random numbers; everything else must stay unread."""
    distiller = small_distiller(objective=objective, ema_decay=0.9)
    tables = [distiller.objective.draw(3, distiller.host_generator) for _ in range(3)]
    monkeypatch.setattr(distiller.objective, "draw", lambda *_: tables.pop())
    for _ in range(3):
        distiller.step(torch.randn(3, 1))  # the optimizer makes its state
    with NoSync():
        for _ in range(6):
            distiller.step(torch.randn(3, 1))


def test_k_step_student_back_propagates_through_every_step():
    distiller = small_distiller(student_steps=4)
    seen = []
    distiller.backbone.student.register_full_backward_hook(lambda *_: seen.append(1))
    distiller.student_step(torch.randn(2, 1))
    assert len(seen) == 4


def test_user_owned_optimizers():
    backbone = cond_backbone()
    optimizers = {
        role: torch.optim.SGD(backbone.parameters_of(role), lr=0.1) for role in ("aux", "student")
    }
    distiller = Distiller(backbone, DistillConfig(guidance=1.0, step_size=0.2), optimizers)
    before = backbone.parameters_of("student")[0].detach().clone()
    distiller.student_step(torch.randn(2, 1))
    assert not torch.equal(before, backbone.parameters_of("student")[0])
    with pytest.raises(ValueError, match="keys aux and student; got"):
        Distiller(backbone, DistillConfig(), {"aux": optimizers["aux"]})


class WrongShape(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, t, cond):
        return self.weight * x[:, :1]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: Distiller(
                CopiedBackbone(CondNetwork(), sample_shape=(DIM,)), DistillConfig(guidance=2.0)
            ).student_step(torch.zeros(2, 1)),
            "give the backbone null_cond",
        ),
        (
            lambda: Distiller(
                CopiedBackbone(WrongShape(), sample_shape=(DIM,)), DistillConfig()
            ).aux_step(torch.zeros(2, 1)),
            r"student network must return the shape of its input, \[2, 3\]; got \[2, 1\]",
        ),
        (
            lambda: small_distiller().aux_step({"a": torch.zeros(2, 1), "b": torch.zeros(3)}),
            "share their batch size",
        ),
        (lambda: small_distiller().aux_step("a prompt"), "pytree of tensors"),
        (lambda: cond_backbone().parameters_of("judge"), "role must be one of"),
    ],
)
def test_errors_say_how_to_mend_them(run, message):
    with pytest.raises(ValueError, match=message):
        run()
