"""mean_velocity, guided, generate: ragged batches, exact limits, errors."""

import pytest
import torch
from gaussian import GaussianFlow

from mfd_fast import generate, guided, mean_velocity
from mfd_fast.baselines.sampling import few_step
from mfd_fast.flow.solvers import SOLVERS, plan
from mfd_fast.flow.times import Schedule
from mfd_fast.testing.numerics import assert_as_accurate

FLOW = GaussianFlow()
T = torch.tensor([0.9, 0.31, 0.55, 1.0, 0.4])
R = torch.tensor([0.1, 0.3, 0.55, 0.0, 0.2])
DYADIC_TIMES = (
    torch.tensor([0.875, 0.375, 0.5, 1, 0.5]),
    torch.tensor([0.125, 0.25, 0.5, 0, 0.25]),
)


def states(dtype=torch.float32):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", [None, 1000])
def test_ragged_batch_equals_one_by_one(solver, grid):
    x = states()
    kwargs = {"step_size": 0.05, "solver": solver, "grid": grid}
    together = mean_velocity(FLOW.velocity, x, T, R, cond=torch.zeros(5), **kwargs)
    uncompacted = mean_velocity(FLOW.velocity, x, T, R, **kwargs)
    alone = torch.cat(
        [
            mean_velocity(FLOW.velocity, x[i : i + 1], T[i : i + 1], R[i : i + 1], **kwargs)
            for i in range(5)
        ]
    )
    assert torch.equal(together, alone) and torch.equal(uncompacted, alone)


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_times_give_the_instantaneous_velocity_exactly(solver):
    x = states()
    u = mean_velocity(FLOW.velocity, x, T, T, step_size=0.02, solver=solver)
    assert torch.equal(u, FLOW.velocity(x, T))


def test_vsd_limit():
    """As r -> t the mean velocity tends to the instantaneous one, linearly in t - r."""
    x, t = states(torch.float64), torch.full((5,), 0.5)
    gaps = [
        (mean_velocity(FLOW.velocity, x, t, t - d, step_size=d / 8) - FLOW.velocity(x, t))
        .abs()
        .max()
        for d in (0.0625, 0.03125)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.1)


def test_euler_is_the_literal_loop():
    x, n = states(), 7
    t, r = torch.full((5,), 0.75), torch.full((5,), 0.25)

    def literal(x, t, r):
        state, dt = x, (t - r)[:, None] / n
        for k in range(n):
            time = t - k * (t - r) / n
            state = state - dt * FLOW.velocity(state, time)
        return (x - state) / (t - r)[:, None]

    ours = mean_velocity(FLOW.velocity, x, t, r, step_size=0.5 / 7)
    assert_as_accurate(ours, literal(x, t, r), literal(x.double(), t.double(), r.double()))


def test_variance_of_independent_noise_falls_as_one_over_n():
    """Noise of variance s^2 in every step leaves Var(u) = s^2 / N (method 7.5, paper C.3)."""
    size = 200_000
    noise = torch.Generator().manual_seed(0)
    x = torch.zeros(1, size)
    for n in (1, 4, 16):
        u = mean_velocity(
            lambda x, t: 0.5 * torch.randn(x.shape, generator=noise),
            x,
            torch.tensor([0.8]),
            torch.tensor([0.3]),
            step_size=0.5 / n,
        )
        # The variance of a sample variance of size m is 2 s^4 / m: five standard errors.
        assert u.var().item() == pytest.approx(0.25 / n, rel=5 * (2 / size) ** 0.5)


def test_closure_over_the_batch_sees_every_row():
    """Without cond nothing leaves the batch, so a velocity may close over something per sample."""
    shift = torch.arange(5.0)[:, None]
    u = mean_velocity(
        lambda x, t: shift.expand_as(x), torch.zeros(5, 3), *DYADIC_TIMES, step_size=0.125
    )
    assert torch.equal(u, shift.expand(5, 3))  # dyadic times and integers: no rounding at all


def test_rows_with_cond_are_only_the_moving_ones():
    calls = []

    def velocity(x, t, cond):
        calls.append(len(x))
        assert len(cond["c"]) == len(x) == len(t)
        return cond["c"][:, None].expand_as(x)

    cond = {"c": torch.arange(5.0)}
    u = mean_velocity(velocity, torch.zeros(5, 3), *DYADIC_TIMES, step_size=0.125, cond=cond)
    table = plan(*DYADIC_TIMES, step_size=0.125)
    assert sum(calls) == table.num_evaluations == 6 + 1 + 1 + 8 + 2
    assert torch.equal(u, cond["c"][:, None].expand(5, 3))


def test_no_gradient_flows_through_a_mean_velocity():
    x = states().requires_grad_()
    weight = torch.ones((), requires_grad=True)
    u = mean_velocity(lambda x, t: weight * x, x, T, R, step_size=0.2)
    assert not u.requires_grad


def test_guided():
    x, t = states(), T
    v = guided(lambda x, t: 3 * x, lambda x, t: x, 4.5)(x, t)
    assert torch.equal(v, x + 4.5 * (3 * x - x))
    cond = FLOW.velocity
    assert guided(cond, lambda x, t: 1 / 0, 1.0) is cond


def test_one_step_generation_is_one_evaluation():
    noise = states()
    x0 = generate(FLOW.velocity, noise)
    assert torch.equal(x0, noise - FLOW.velocity(noise, torch.ones(5)))


@pytest.mark.parametrize("solver", ["euler", "ab2", "dpmpp_2m"])
def test_gradient_of_generation_equals_autograd_of_the_in_place_value(solver):
    """With gradients the loop is functional; its values are those of the fused in-place loop."""
    noise = states(torch.float64)
    weight = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

    def sample(weight, noise):
        return generate(lambda x, t: weight * FLOW.velocity(x, t), noise, steps=4, solver=solver)

    exact, functional = (
        sample(weight, noise).detach(),
        sample(weight.float(), noise.float()).detach(),
    )
    with torch.no_grad():
        assert_as_accurate(sample(weight.float(), noise.float()), functional, exact)
    assert torch.autograd.gradcheck(lambda weight: sample(weight, noise), weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_velocity(FLOW.velocity, torch.zeros(2, 3), T, R), r"\[B\] for x .*\[2, 3\]"),
        (lambda: mean_velocity(lambda x, t: x[:, :1], torch.zeros(5, 3), T, R), "shape of x"),
        (lambda: mean_velocity(FLOW.velocity, torch.zeros(5, 3), R, T), "r must be <= t"),
        (
            lambda: mean_velocity(FLOW.velocity, torch.zeros(5, 3), T, R, step_size=-1.0),
            "step_size",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("sampler", ["flow", "renoise"])
def test_a_schedule_that_begins_below_1_begins_with_its_share_of_noise(sampler):
    """Of exact velocities to one point, x_t = (1 - t) data + t noise is left for the data."""
    noise, data, start = torch.randn(3, 4), torch.tensor([1.0, -2.0, 0.5, 3.0]), 80 / 81
    schedule, states = Schedule((start, 0.5, 0.0), (start, 0.5), start), []

    def velocity(x, t):
        states.append(x)
        return (x - data) / t[:, None]

    end = few_step(sampler, velocity, noise, steps=2, schedule=schedule)
    assert torch.equal(states[0], start * noise)
    torch.testing.assert_close(end, data.expand(3, 4))
