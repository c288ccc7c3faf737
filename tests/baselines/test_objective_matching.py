"""vsd, dmd2 and senseflow: gradients in closed form, who learns from what, both stabilisers."""

import math

import pytest
import torch
from compared_cases import DIM, FLOW, ExactJump, ExactVelocity, data, make_case, rounding
from gaussian import GaussianNetwork
from torch import nn

from mfd_fast import CopiedBackbone, DistillConfig
from mfd_fast.baselines.config import ComparisonConfig, Dmd2Settings, SenseFlowSettings
from mfd_fast.baselines.distiller import ComparisonDistiller
from mfd_fast.baselines.dmd2 import normalised_gradient
from mfd_fast.baselines.objectives import needs_of
from mfd_fast.distill.objectives import make_objective
from mfd_fast.flow.solvers import plan
from mfd_fast.run.maker import make_distiller


def kl_gradient(mean, std, t):
    """d KL / d (m, s) of N((1-t) m, (1-t)^2 s^2 + t^2) against the teacher's N(.3, .5^2) noised."""
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, std))
    student, teacher = ((1 - t) ** 2 * v**2 + t**2 for v in (s, torch.tensor(0.5).double()))
    shift = (1 - t) * (m - 0.3)
    kl = 0.5 * (torch.log(teacher / student) + (student + shift**2) / teacher - 1)
    return torch.stack(torch.autograd.grad(kl, (m, s)))


@pytest.mark.parametrize("weighting", ["score", "velocity"])
@pytest.mark.parametrize("time", [0.25, 0.75])
def test_vsd_gradient_is_the_kl_gradient(weighting, time):
    """Exact auxiliary, four points (+-1, +-1) of (x_0, eps): they have the moments of a normal, and
    the field is affine.  Score weighting is d KL; the velocity form is t / (1 - t) of it."""
    mean, std = -0.4, 0.8
    m, s = (torch.tensor(v, requires_grad=True) for v in (mean, std))
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    x0, noise = m + s * signs[:, :1], signs[:, 1:]
    config = DistillConfig(objective="vsd", guidance=1.0, score_weighting=weighting == "score")
    backbone = CopiedBackbone(
        GaussianNetwork(dim=1), auxiliary=GaussianNetwork(mean, std, 1), sample_shape=(1,)
    )
    at = torch.full((4,), time)
    table = plan(at, at, step_size=config.step_size)
    prepared = backbone.prepare(torch.zeros(4, 1))
    loss, _ = make_objective(config).student_loss(backbone, prepared, x0, noise, table)
    factor = 1.0 if weighting == "score" else time / (1 - time)
    exact = kl_gradient(mean, std, time)
    ours = torch.stack(torch.autograd.grad(loss, (m, s))) / factor
    # The addends are differences of two velocities, each ten roundings of numbers up to `largest`.
    x_t = ((1 - time) * x0 + time * noise).detach()
    velocities = [net(x_t, at, torch.zeros(4, 1)) for net in (backbone.teacher, backbone.aux)]
    largest = max(v.detach().abs().max() for v in velocities) / factor
    assert (ours - exact).abs().max() <= 10 * torch.finfo(torch.float32).eps * largest


def test_dmd2_gradient_is_the_normalised_difference_of_the_predictions():
    x0, x_t, v_teacher, v_aux = (data(8, seed) for seed in range(4))
    t = torch.rand(8, dtype=torch.float64) * 0.9 + 0.05
    gradient = normalised_gradient(x0, x_t, t, v_teacher, v_aux)
    for i in range(8):
        teacher, aux = x_t[i] - t[i] * v_teacher[i], x_t[i] - t[i] * v_aux[i]
        expected = (aux - teacher) / (x0[i] - teacher).abs().mean()
        assert (gradient[i] - expected).abs().max() <= rounding(expected)


class Toy(nn.Module):
    """A velocity network with a middle layer."""

    middle_width = 4

    def __init__(self, second_time=False):
        super().__init__()
        self.enter = nn.Linear(DIM + 1 + second_time, 4)
        self.middle = nn.Tanh()
        self.leave = nn.Linear(4, DIM)

    def forward(self, x, t, cond, *end):
        times = [time.to(x.dtype)[:, None] for time in (t, *end)]
        return self.leave(self.middle(self.enter(torch.cat((x, *times), dim=1))).unsqueeze(1))[:, 0]


class ToyTokens(Toy):
    """The same with tokens ``[B, T, D]`` in the middle."""

    def forward(self, x, t, cond, *end):
        tokens = self.enter(torch.cat((x, t.to(x.dtype)[:, None]), dim=1)).unsqueeze(1)
        return self.leave(self.middle(tokens))[:, 0]


def toy_distiller(objective, **settings):
    torch.manual_seed(0)
    second = needs_of(ComparisonConfig(objective=objective)).second_time
    backbone = CopiedBackbone(
        ToyTokens(),
        student=Toy(second_time=True) if second else None,
        sample_shape=(DIM,),
        null_cond=torch.zeros_like,
    )
    config = ComparisonConfig(objective=objective, step_size=0.2, aux_updates=2, **settings)
    return make_distiller(backbone, config)


def condition(distiller, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(size, 1, generator=generator)
    pair = (torch.randn(size, DIM, generator=generator), cond)
    return pair if needs_of(distiller.config).uses_data else cond


@pytest.mark.parametrize("objective", ["dmd2", "senseflow"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_students_update_leaves_no_gradient_on_auxiliary_and_discriminator(objective, steps):
    distiller = toy_distiller(objective, student_steps=steps, dmd2=Dmd2Settings(gan_weight=1.0))
    distiller._student_backward(condition(distiller))
    assert all(p.grad is None for p in distiller.parameters_of("aux"))
    assert all(p.grad.abs().sum() > 0 for p in distiller.parameters_of("student"))


def test_the_adversarial_gradient_is_that_of_a_direct_backward():
    """d/dx_0 of softplus(-D(x_t)), through features and noising."""
    distiller = toy_distiller("dmd2")
    objective = distiller.objective
    x0, t = torch.randn(8, DIM, requires_grad=True), torch.rand(8)
    cond = condition(distiller)
    distiller.generator.manual_seed(5)
    loss = objective.fooling_loss(distiller._batch(cond), x0, t)
    (ours,) = torch.autograd.grad(loss, x0)
    distiller.generator.manual_seed(5)
    noise = distiller._noise(8)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
    aux = distiller.backbone.aux
    features = aux.middle(aux.enter(torch.cat((x_t, t[:, None]), dim=1)))
    direct = torch.nn.functional.softplus(-objective.head(features)).mean()
    (expected,) = torch.autograd.grad(direct, x0)
    eps = torch.finfo(torch.float32).eps
    assert (ours - expected).abs().max() <= 100 * eps * expected.abs().max()


def test_the_discriminator_learns_to_tell_real_from_fake():
    """Data far from the samples: after some updates D(real) > 0 > D(fake)."""
    distiller = toy_distiller("dmd2", dmd2=Dmd2Settings(critic_weight=1.0))
    real, cond = torch.randn(256, DIM) + 4.0, torch.zeros(256, 1)
    objective, batch = distiller.objective, distiller._batch((real, cond))
    optimizer = torch.optim.Adam(distiller.parameters_of("aux"), lr=0.02)
    t = torch.full((256,), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        objective.aux_loss(batch, t).backward()
        optimizer.step()
    fake = distiller.generate(torch.randn(256, DIM), cond)
    with torch.no_grad():
        assert objective.logit(batch, real, t).mean() > 0 > objective.logit(batch, fake, t).mean()


def test_backward_simulation_trains_on_the_students_own_states():
    """Step k of K starts from the k-times re-noised sample; the state itself has no gradient."""
    distiller = toy_distiller("dmd2", student_steps=4)
    seen = set()
    for seed in range(12):
        distiller.host_generator.manual_seed(seed)
        segment = distiller.objective.segment(distiller._batch(condition(distiller)))
        seen.add((segment.t, segment.r))
        assert not segment.x.requires_grad and segment.velocity.requires_grad
    assert seen == {(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)}


def test_ida_moves_the_auxiliary_towards_the_student():
    """phi_A <- lambda phi_A + (1 - lambda) theta_S after a student update, and only then."""
    decay = 0.75
    distiller = toy_distiller("senseflow", senseflow=SenseFlowSettings(ida_decay=decay))
    cond = condition(distiller)
    before = [p.detach().clone() for p in distiller.backbone.parameters_of("aux")]
    distiller.student_step(cond)
    aux, student = (distiller.backbone.parameters_of(role) for role in ("aux", "student"))
    assert any((a - b).abs().max() > 0 for a, b in zip(aux, before, strict=True))
    for a, b, s in zip(aux, before, student, strict=True):
        expected = decay * b.double() + (1 - decay) * s.double()
        assert (a - expected).abs().max() <= 2 * torch.finfo(
            torch.float32
        ).eps * expected.abs().max()


def test_ida_leaves_the_auxiliary_after_a_skipped_update():
    distiller = toy_distiller("senseflow", senseflow=SenseFlowSettings(ida_decay=0.5))
    aux = distiller.backbone.parameters_of("aux")
    before = [p.detach().clone() for p in aux]
    with torch.no_grad():  # a student that is elsewhere: IDA would move the auxiliary
        for parameter in distiller.backbone.parameters_of("student"):
            parameter.add_(1.0)
    data, cond = condition(distiller)
    generator = distiller.backbone.student.register_forward_hook(lambda *args: args[-1] * math.nan)
    distiller.student_step((data, cond))
    assert distiller.skipped.item() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(aux, before, strict=True))
    generator.remove()
    distiller.student_step((data, cond))
    assert not any(torch.equal(a, b) for a, b in zip(aux, before, strict=True))


class Pointer(ExactJump):
    """The exact one-step student, with what a discriminator asks for."""

    middle_width = 1

    def __init__(self, error=0.0):
        super().__init__(error)
        self.middle = nn.Identity()


class PointerTeacher(ExactVelocity):
    middle_width = 1

    def __init__(self):
        super().__init__()
        self.middle = nn.Identity()


def test_isg_target_is_one_step_of_the_teacher_and_one_of_the_student():
    """The exact student takes x_mid to the end of its trajectory; t_mid is .05 inside."""
    objective, batch = make_case("senseflow", Pointer(), size=512, teacher=PointerTeacher())
    segment = objective.segment(batch)
    assert (segment.t, segment.r) == (1.0, 0.0)
    state = batch.host.get_state()
    target = objective.guidance_target(batch, segment)
    batch.host.set_state(state)
    t = (0.05 + 0.9 * torch.rand(512, generator=batch.host)).double()
    middle = segment.x - (1 - t)[:, None] * FLOW.velocity(segment.x, torch.ones(512))
    expected = FLOW.flow_map(middle, t, torch.zeros_like(t))
    slack = 4 * torch.finfo(torch.float32).eps * segment.x.abs().max()  # times are float32
    assert (target - expected).abs().max() <= slack


def test_half_of_senseflows_states_are_noised_data():
    """The others are the student's own, all of them for dmd2."""
    own = {}
    for name in ("dmd2", "senseflow"):
        distiller = toy_distiller(name, student_steps=2)
        data, cond = condition(distiller)
        batch = distiller._batch((data + 1000.0, cond))
        states = [distiller.objective.state(batch, 1) for _ in range(40)]
        own[name] = sum(state.mean().item() < 100 for state in states)
    assert own["dmd2"] == 40
    assert 10 <= own["senseflow"] <= 30  # of 40 throws of a coin, seeded


def test_plugged_in_features_are_what_the_discriminator_reads():
    torch.manual_seed(0)
    backbone = CopiedBackbone(ToyTokens(), sample_shape=(DIM,), null_cond=torch.zeros_like)
    calls = []

    def features(x):
        calls.append(x.shape)
        return torch.cat((x, x**2), dim=1)

    config = ComparisonConfig(objective="senseflow", step_size=0.2, aux_updates=1)
    distiller = ComparisonDistiller(backbone, config, features=(features, 2 * DIM))
    for _ in range(2):
        distiller.step(condition(distiller))
    assert calls == [(8, DIM)] * 3  # fake and real for the critic, fake for the student


def test_a_network_without_a_middle_is_refused_by_name():
    backbone = CopiedBackbone(GaussianNetwork(dim=DIM), sample_shape=(DIM,))
    with pytest.raises(ValueError, match="GaussianNetwork must have a module `middle`"):
        make_distiller(backbone, ComparisonConfig(objective="dmd2"))


@pytest.mark.parametrize(
    "objective", ["dmd2", "senseflow", "cd", "ayf", "meanflow", "imm", "reflow"]
)
def test_a_state_dict_continues_bit_for_bit(objective):
    first = toy_distiller(objective, ema_decay=0.9)
    conds = [condition(first, seed=seed) for seed in range(6)]
    for cond in conds[:3]:
        first.step(cond)
    state = first.state_dict()
    for cond in conds[3:]:
        first.step(cond)
    second = toy_distiller(objective, ema_decay=0.9)
    second.load_state_dict(state)
    for cond in conds[3:]:
        second.step(cond)
    for role in first.roles:
        for a, b in zip(first.parameters_of(role), second.parameters_of(role), strict=True):
            assert torch.equal(a, b)
    assert math.isfinite(first.generate(torch.randn(4, DIM), torch.zeros(4, 1)).sum())
