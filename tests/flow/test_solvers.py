"""Order of every solver against the closed form, the diffusers scheduler, the number of steps."""

import numpy as np
import pytest
import torch
from gaussian import GaussianFlow

from mfd_fast import dpm_flow_schedule, generate, mean_velocity
from mfd_fast.flow.solvers import SOLVERS, num_steps, plan, scheduled

ORDER = {"euler": 1, "heun": 2, "ab2": 2, "dpmpp_2m": 2}
# A wide interval inside (0, 1), an end at noise, an end at data.
T = torch.tensor([0.875, 1.0, 0.75])
R = torch.tensor([0.125, 0.25, 0.0])


INSIDE = (torch.tensor([0.875, 0.75]), torch.tensor([0.125, 0.25]))
FLOW = GaussianFlow()


def error(solver, step_size):
    # DPM-Solver++ steps in log-SNR, which is infinite at t = 0 and 1: there it falls back to first
    # order for two steps, so its order shows inside the interval only.
    t, r = INSIDE if solver == "dpmpp_2m" else (T, R)
    x = torch.linspace(-2, 2, 4 * len(t), dtype=torch.float64).view(-1, 4)
    u = mean_velocity(FLOW.velocity, x, t, r, step_size=step_size, solver=solver)
    return (u - FLOW.mean_velocity(x, t.double(), r.double())).abs().max().item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_convergence_order(solver):
    """The slope of log error against log h over two octaves is the order, within a tenth."""
    steps = np.array([1 / 64, 1 / 128, 1 / 256])  # above the rounding of float32 coefficients
    errors = np.array([error(solver, h) for h in steps])
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDER[solver], abs=0.1), (slope, errors)


def test_second_order_beats_euler_at_the_same_evaluations():
    assert error("ab2", 0.02) < error("euler", 0.02) / 4
    assert error("heun", 0.04) < error("euler", 0.02) / 4


@pytest.mark.parametrize(
    ("t", "r", "h", "n"),
    [
        (0.5, 0.48, 0.02, 1),
        (0.54, 0.5, 0.02, 2),
        (0.541, 0.5, 0.02, 3),
        (1.0, 0.0, 0.02, 50),
        (1.0, 0.0, 0.03, 34),
        (0.3, 0.3, 0.02, 0),
        (0.3, 0.2999, 0.02, 1),
        (1.0, 0.0, 2.0, 1),
    ],
)
def test_number_of_steps_is_the_ceiling(t, r, h, n):
    assert num_steps(torch.tensor([t]), torch.tensor([r]), step_size=h)[0] == n


def test_grid_rounds_every_time_and_skips_nothing():
    t, r = torch.tensor([0.98765, 0.40049]), torch.tensor([0.12345, 0.40011])
    table = plan(t, r, step_size=0.02, grid=1000)
    thousandths = table.times.double() * 1000
    assert torch.equal(thousandths.round().float() / 1000, table.times)
    assert table.times[0, 0] == torch.tensor(0.988)
    dt = -table.coef[:, 0, 1].double()
    assert dt.sum().item() == pytest.approx(0.988 - 0.123, abs=1e-6)
    assert table.active[0] == 2 and table.active[-1] == 1
    assert table.start_weight.tolist() == [1.0, 0.0]  # 0.400 and 0.400: equal on the grid


def test_a_step_smaller_than_the_grid_takes_one_step_per_cell():
    table = plan(torch.tensor([0.5]), torch.tensor([0.49]), step_size=0.0001, grid=1000)
    assert len(table.active) == 10


def test_samples_are_sorted_so_that_the_moving_ones_are_a_prefix():
    t, r = torch.tensor([0.2, 0.9, 0.5, 0.5]), torch.tensor([0.1, 0.1, 0.5, 0.1])
    table = plan(t, r, step_size=0.1)
    assert table.order.tolist() == [1, 3, 0, 2]
    assert table.active == (4, 2, 2, 2, 1, 1, 1, 1)
    assert table.num_evaluations == 1 + 8 + 4 + 1
    assert torch.equal(table.coef[1, 2], torch.tensor([1.0, 0, 0, 0, 0]))  # arrived: stands still


@pytest.mark.parametrize(
    ("t", "r", "kwargs", "message"),
    [
        ([0.2], [0.5], {}, r"r must be <= t for every sample; sample 0 has t=0.2, r=0.5"),
        ([0.5], [0.2], {"step_size": 0.0}, "step_size must be > 0, got 0.0"),
        (
            [0.5],
            [0.2],
            {"solver": "rk4"},
            r"one of \['ab2', 'dpmpp_2m', 'euler', 'heun'\], got 'rk4'",
        ),
        ([1.5], [0.2], {}, r"times must lie in \[0, 1\]"),
        ([], [], {}, "at least one sample"),
    ],
)
def test_bad_plans_are_named(t, r, kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan(torch.tensor(t), torch.tensor(r), **{"step_size": 0.02} | kwargs)


@pytest.mark.parametrize("steps", [*range(1, 9), 20])
def test_dpmpp_2m_equals_the_diffusers_scheduler(steps):
    """K-step sampling of SANA: the same states as diffusers, to float32 rounding of its own
    tables.
    """
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(steps)
    schedule = dpm_flow_schedule(steps)
    assert [round(1000 * t) for t in schedule.times] == scheduler.timesteps.tolist()
    assert np.abs(np.array(schedule.nodes) - scheduler.sigmas.double().numpy()).max() < 2**-23

    noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(steps))
    x, exact = noise.clone(), noise.double()
    for timestep in scheduler.timesteps:
        v = FLOW.velocity(x, torch.full((2,), timestep / 1000))
        x = scheduler.step(v, timestep, x).prev_sample
    ours = generate(FLOW.velocity, noise, steps=steps, solver="dpmpp_2m", schedule=schedule)
    exact = generate(FLOW.velocity, exact, steps=steps, solver="dpmpp_2m", schedule=schedule)
    theirs_off = (x.double() - exact).abs().max().item()
    ours_off = (ours.double() - exact).abs().max().item()
    eps = torch.finfo(torch.float32).eps
    # diffusers' own float32 tables are the yardstick: it may not be farther from our float64 run
    # than rounding its log-SNRs allows, and we may not be farther than it.
    assert theirs_off <= 64 * steps * eps * exact.abs().max().item()
    assert ours_off <= 2 * theirs_off + eps * exact.abs().max().item()


def test_bad_schedules_are_named():
    from mfd_fast.flow.times import Schedule

    with pytest.raises(ValueError, match="descending"):
        scheduled(Schedule((0.0, 1.0), (0.0,)), 2)
    with pytest.raises(ValueError, match="steps=3, but the schedule has 4"):
        generate(lambda x, t: x, torch.zeros(1, 2), steps=3, schedule=dpm_flow_schedule(4))
