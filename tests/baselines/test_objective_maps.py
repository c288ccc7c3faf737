"""ayf, meanflow, cd, imm and reflow against exact flows, where their targets are known."""

import itertools
import math

import pytest
import torch
from compared_cases import (
    DIM,
    FLOW,
    ExactFlowMap,
    ExactJump,
    ExactVelocity,
    data,
    make_case,
    rounding,
)
from torch import Generator, nn

from mfd_fast.baselines.batch import along_flow
from mfd_fast.baselines.cd import consistency, num_nodes
from mfd_fast.baselines.config import AyfSettings, CdSettings, MeanFlowSettings
from mfd_fast.baselines.imm import KERNEL_FLOOR, push, squared_mmd, time_weight
from mfd_fast.flow.solvers import num_steps


def pairs(size=16):
    """t > s in (0, 1), float64."""
    draws = torch.rand(2, size, dtype=torch.float64, generator=Generator().manual_seed(3))
    t = draws.max(0).values
    return t, t * draws.min(0).values


def gradient(objective, batch, parameter):
    loss, _ = objective.student_loss(batch)
    return torch.autograd.grad(loss, parameter)[0]


def test_total_derivative_is_the_one_along_the_trajectory():
    """d/dt of (x, t) -> t x^2 along dx/dt = v is x^2 + 2 t x v."""
    x, v = (data(16, seed) for seed in (1, 2))
    t, _ = pairs()
    value, rate = along_flow(lambda x, t: t[:, None] * x**2, x, t, v, 0 * t, over=0)
    exact = x**2 + 2 * t[:, None] * x * v
    assert torch.equal(value, t[:, None] * x**2)
    assert (rate - exact).abs().max() <= rounding(exact)


def test_the_quotient_is_exact_for_a_field_that_is_linear_along_the_flow():
    """Also where it is cut: at t = 1, and at the end of the interval."""
    x, v = (data(16, seed) for seed in (1, 2))
    t, end = pairs()
    t, end = torch.cat((t[:-2], torch.ones(2))), torch.cat((end[:-2], t[:1], torch.zeros(1)))
    end = torch.minimum(end.double(), t)
    t[1] = end[1]  # nothing before it
    field = lambda x, t: 3 * x + 5 * t[:, None]  # noqa: E731
    value, rate = along_flow(field, x, t, v, end, over=0.04)
    assert torch.equal(value, field(x, t))
    assert (rate - (3 * v + 5)).abs().max() <= rounding(x) / 0.02


def test_the_quotient_does_not_see_the_ripple_of_a_time_embedding():
    """v + 0.001 sin(1000 t): the derivative is off by up to 1, the quotient by 0.002 / 0.04."""
    x, v = (data(16, seed) for seed in (1, 2))
    t = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    field = lambda x, t: x + 0.001 * torch.sin(1000 * t)[:, None]  # noqa: E731
    errors = {
        over: (along_flow(field, x, t, v, 0 * t, over=over)[1] - v).abs().max().item()
        for over in (0.0, 0.04)
    }
    assert errors[0.0] > 0.5
    assert errors[0.04] <= 0.002 / 0.04 + rounding(v) / 0.04


@pytest.mark.parametrize("name", ["ayf", "meanflow"])
def test_differences_leave_the_exact_map_an_error_of_second_order(name):
    """A quarter for half the span."""
    t, end = 0.5 + 0.4 * pairs()[0], 0.3 * pairs()[1]
    x, errors = data(16, 4), []
    for over in (0.08, 0.04):
        settings = {"ayf": AyfSettings, "meanflow": MeanFlowSettings}[name](derivative_span=over)
        objective, batch = make_case(name, ExactFlowMap(), **{name: settings})
        v = FLOW.velocity(x, t)
        if name == "ayf":
            error = objective.tangent(batch, x, t, end, warmth=1.0)
        else:
            error = objective.target(batch, x, t, end, v) - FLOW.mean_velocity(x, t, end)
        errors.append(error.abs().max().item())
    assert 3.8 < errors[0] / errors[1] < 4.2


def test_ayf_tangent_vanishes_on_the_exact_flow_map_and_nowhere_else():
    t, s = pairs()
    for error, vanishes in ((0.0, True), (0.1, False)):
        objective, batch = make_case("ayf", ExactFlowMap(error))
        tangent = objective.tangent(batch, data(16, 4), t, s, warmth=1.0)
        limit = rounding(FLOW.velocity(data(16, 4), t)) / (t - s).min()
        assert (tangent.abs().max() <= limit) == vanishes


def test_ayf_without_its_second_term_is_the_distance_to_the_teacher():
    """Warmth 0: g = v_T - F, so a map with F = v_T has none."""
    t, s = pairs()
    objective, batch = make_case("ayf", ExactFlowMap())
    x = data(16, 4)
    expected = FLOW.velocity(x, t) - FLOW.mean_velocity(x, t, s)
    assert torch.equal(objective.tangent(batch, x, t, s, warmth=0.0), expected)


@pytest.mark.parametrize("error", [-0.2, 0.2])
def test_ayf_descends_to_the_exact_map(error):
    """The gradient has the sign of the error once the warm-up is over."""
    student = ExactFlowMap(error)
    objective, batch = make_case("ayf", student, size=512, update=1000)
    assert gradient(objective, batch, student.error) * error > 0


def test_meanflow_target_is_the_average_velocity_of_a_point_mass():
    """Data at one point: v is constant along a trajectory, so u = v for every r."""

    class PointMass(nn.Module):
        def __init__(self):
            super().__init__()
            self.point = nn.Parameter(torch.full((DIM,), 0.7, dtype=torch.float64))

        def forward(self, x, t, cond, end):
            return (x - self.point) / t[:, None]

    student = PointMass()
    objective, batch = make_case("meanflow", student)
    t, r = pairs()
    noise = data(16, 5)
    x = (1 - t[:, None]) * student.point + t[:, None] * noise
    v = noise - student.point
    target = objective.target(batch, x.detach(), t, r, v.detach())
    assert (target - v).abs().max() <= rounding(v) / t.min()


def test_meanflow_target_is_the_exact_average_velocity_along_the_marginal_flow():
    """Given the marginal velocity, the exact map is its own target (Eq. 6 of that paper)."""
    objective, batch = make_case("meanflow", ExactFlowMap())
    t, r = pairs()
    x = data(16, 6)
    target = objective.target(batch, x, t, r, FLOW.velocity(x, t))
    exact = FLOW.mean_velocity(x, t, r)
    assert (target - exact).abs().max() <= rounding(exact) / (t - r).min()
    wrong = make_case("meanflow", ExactFlowMap(0.1))
    off = wrong[0].target(wrong[1], x, t, r, FLOW.velocity(x, t))
    assert (off - 1.1 * exact).abs().max() > 0.01


def test_meanflow_at_equal_times_is_weighted_flow_matching():
    """r = t: the target is v itself, whatever the network; the weight is 1 / (error + c)."""
    student = ExactJumpOfTwoTimes(0.3)
    settings = MeanFlowSettings(equal_fraction=1.0)
    objective, batch = make_case("meanflow", student, meanflow=settings)
    x, v = data(16, 7), data(16, 8)
    t, _ = pairs()
    assert torch.equal(objective.target(batch, x, t, t, v), v)
    loss, metrics = objective.student_loss(batch)
    assert 0.9 < loss <= 1.0  # error / (error + 1e-3), errors of order 1
    assert metrics["distance"] > 0.1


def test_cd_loss_vanishes_with_the_step_on_the_exact_jump():
    """One Euler step of size h leaves an O(h^2) error of the target: a quarter for half the h."""
    errors = []
    for h in (0.02, 0.01, 0.005):
        objective, batch = make_case("cd", ExactJump(), size=4096, step_size=h)
        errors.append(objective.student_loss(batch)[1]["distance"].item())
    rates = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(3.5 < rate < 4.5 for rate in rates), rates


@pytest.mark.parametrize("step", [0.3, 0.07, 0.05, 0.03, 0.02])
def test_cd_takes_one_solver_step_from_node_to_node(step):
    """Also where 1 / h is no whole number."""
    nodes = torch.arange(num_nodes(step) + 1) / num_nodes(step)
    assert (num_steps(nodes[1:], nodes[:-1], step_size=step) == 1).all()


def test_cd_target_is_the_sample_at_the_end_of_the_trajectory():
    t, _ = pairs()
    x = data(16, 9)
    end = FLOW.flow_map(x, t, torch.zeros_like(t))
    f = consistency(lambda x, t: ExactJump()(x, t, None), x, t)
    assert (f - end).abs().max() <= rounding(end, x)
    assert torch.equal(consistency(lambda x, t: x, x, torch.zeros(16)), x)  # f(x, 0) = x


@pytest.mark.parametrize("distance", ["huber", "l2"])
def test_cd_descends_to_the_exact_jump(distance):
    for error in (-0.2, 0.2):
        student = ExactJump(error)
        settings = {"step_size": 0.05, "cd": CdSettings(distance=distance)}
        objective, batch = make_case("cd", student, size=512, **settings)
        assert gradient(objective, batch, student.error) * error > 0


def test_mmd_is_zero_for_equal_sets_and_not_for_others():
    a, b = data(20, 1).view(5, 4, DIM), data(20, 2).view(5, 4, DIM)
    scale = torch.rand(5, dtype=torch.float64) + 0.1
    assert squared_mmd(a, a.clone(), scale=scale).abs().max() <= rounding(torch.ones(1))
    assert (squared_mmd(a, b, scale=scale) > 0.001).all()


def test_mmd_of_two_points_is_the_kernel_by_hand():
    """Sets of one point each: k(a, a) + k(b, b) - 2 k(a, b) = 2 - 2 exp(-|a - b| / (D c))."""
    a, b = torch.zeros(1, 1, DIM).double(), torch.full((1, 1, DIM), 2.0).double()
    scale = torch.tensor([0.5]).double()
    distance = 2.0 * DIM**0.5
    kernel = [math.exp(-length / (DIM * 0.5)) for length in (KERNEL_FLOOR, distance)]
    expected = torch.tensor([2 * kernel[0] - 2 * kernel[1]], dtype=torch.float64)
    assert (squared_mmd(a, b, scale=scale) - expected).abs().max() <= rounding(expected)


def test_imm_pushes_agree_on_the_exact_map_of_a_point_mass():
    """Data at one point: x_t and x_r lie on one trajectory, both pushes end at the same place."""

    class PointMass(nn.Module):
        def __init__(self):
            super().__init__()
            self.point = nn.Parameter(torch.full((DIM,), 0.7, dtype=torch.float64))

        def forward(self, x, t, cond, end):
            return (x - self.point) / t[:, None]

    student = PointMass()
    objective, batch = make_case("imm", student)
    object.__setattr__(batch, "data", student.point.detach().expand(16, DIM).clone())
    loss, metrics = objective.student_loss(batch)
    bound = 0.994 / 0.006  # x_t - point over t, and back
    assert metrics["distance"] <= (rounding(torch.ones(1)) * bound).sqrt()
    object.__setattr__(batch, "data", data(16))
    assert objective.student_loss(batch)[0] > 10 * loss


def test_imm_times_are_ordered_and_one_step_of_eta_apart():
    objective, _ = make_case("imm", ExactFlowMap())
    t, r, s = objective.draw_times(5000, Generator().manual_seed(0))
    assert ((s <= r) & (r < t)).all()
    eta = [time.double() / (1 - time.double()) for time in (t, r)]
    step = (0.994 / 0.006 - 0.006 / 0.994) / 2**12
    free = r > s
    # float32 times: eta carries eps / (1 - t)^2.
    slack = 4 * torch.finfo(torch.float32).eps / (1 - t.double()) ** 2
    assert ((eta[0] - eta[1] - step).abs() <= slack)[free].all()
    assert free.float().mean() > 0.5
    assert (time_weight(t) > 0).all()


def test_imm_push_is_the_ddim_step():
    """With F = eps - x_0 the push takes x_t to (1 - s) x_0 + s eps."""
    x0, eps = data(16, 1), data(16, 2)
    t, s = pairs()
    x_t = (1 - t[:, None]) * x0 + t[:, None] * eps
    x_s = (1 - s[:, None]) * x0 + s[:, None] * eps
    assert (push(lambda x, t, s: eps - x0, x_t, t, s) - x_s).abs().max() <= rounding(x_s, x_t)


def test_imm_refuses_a_batch_that_makes_no_sets():
    objective, batch = make_case("imm", ExactFlowMap(), size=6)
    with pytest.raises(ValueError, match=r"imm.particles=4 samples: the batch must .* got 6"):
        objective.student_loss(batch)


class ExactJumpOfTwoTimes(ExactJump):
    """Takes a second time and does not look at it."""

    def forward(self, x, t, cond, end):
        return super().forward(x, t, cond)


class Translation(nn.Module):
    """The straight flow that moves every point by -shift: its velocity is constant."""

    def __init__(self, shift=1.5):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x, t, cond):
        return self.shift.expand_as(x)


def test_reflow_is_still_at_a_straight_flow():
    """Teacher and student the same translation: no gradient (four steps of 1/4 are exact)."""
    for shift, is_still in ((1.5, True), (1.0, False)):
        student = Translation(shift)
        objective, batch = make_case("reflow", student, teacher=Translation(), step_size=0.25)
        slope = gradient(objective, batch, student.shift).abs()
        assert (slope <= rounding(torch.tensor(1.5))) == is_still


def test_reflow_pairs_are_the_teachers_ode():
    """The regression target of a Gaussian teacher: z minus the exact end, up to Euler's O(h)."""
    _, batch = make_case("reflow", ExactVelocity())
    z = data(16, 3)
    ends = [batch.fields.teacher_samples(z, steps=steps) for steps in (50, 100)]
    exact = FLOW.flow_map(z, torch.ones(16), torch.zeros(16))
    coarse, fine = ((end - exact).norm() for end in ends)
    assert 1.8 < coarse / fine < 2.2
