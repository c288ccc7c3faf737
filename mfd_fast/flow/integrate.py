"""The one solver loop of the project, and what is built on it: mean velocities and sampling.

    mean velocity   u(x_t; t -> r) = (x_t - Phi(x_t; t -> r)) / (t - r)    (the paper's AVF)

Samples are sorted by their number of steps, so the ones still moving are always a prefix and the
batch shrinks as they arrive: the cost is the sum of N over the samples, not batch x max N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mfd_fast.flow.solvers import SolverTable, plan, scheduled
from mfd_fast.flow.times import Schedule, uniform_schedule
from mfd_fast.ops import ode_step_, reference

Velocity = Callable[..., Tensor]


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    table: SolverTable,
    *,
    guidance: float = 1.0,
    num_lanes: int | None = None,
    dtype: torch.dtype | None = None,
    compact: bool = True,
) -> Tensor:
    """Move the trajectories of every sample along the table and return where they end.

    Args:
        velocity: (lanes ``[n, L, *S]`` in ``dtype``, t ``[n]``) -> velocities ``[n, L, *S]``; n <=
            B is the prefix of samples still moving (n = B always if ``compact`` is False).
        x: states ``[B, S, *S]`` float32 or float64, in the order of the table; not modified.
        guidance: guidance scale of trajectory 0 when ``num_lanes`` is S + 1.
        num_lanes: L; S if None.
        dtype: the model's dtype; that of x if None.

    With gradients enabled every step is functional and the gradient flows through all of them;
    without, one in-place operator a step updates state, history and the next model inputs.
    """
    table = table if table.coef.device == x.device else table.to(x.device)
    num_lanes = x.shape[1] if num_lanes is None else num_lanes
    if torch.is_grad_enabled():
        return _integrate_with_grad(velocity, x, table, guidance, dtype or x.dtype)
    moving = Trajectories.like(x, num_lanes, dtype or x.dtype, has_history=table.has_history)
    moving.start(x)
    for k, active in enumerate(table.active):
        n = active if compact else x.shape[0]
        moving.step(velocity, n, table.times[k, :n], table.coef[k, :n], guidance)
    return moving.x


@dataclass
class Trajectories:
    """The buffers of a batch of trajectories, updated in place: they keep their addresses.

    x: states ``[B, S, *S]`` float32; x_in: next model inputs ``[B, L, *S]`` in the model's dtype;
    history: what a multistep solver remembers, like x, or None.
    """

    x: Tensor
    x_in: Tensor
    history: Tensor | None

    @classmethod
    def like(
        cls, x: Tensor, num_lanes: int, dtype: torch.dtype, *, has_history: bool
    ) -> "Trajectories":
        """Uninitialised buffers for states like x ``[B, S, *S]`` seen by ``num_lanes`` lanes."""
        states = torch.empty_like(x, memory_format=torch.contiguous_format)
        lanes = x.new_empty(x.shape[0], num_lanes, *x.shape[2:], dtype=dtype)
        return cls(states, lanes, torch.empty_like(states) if has_history else None)

    def start(self, x: Tensor) -> None:
        """Put every trajectory at x ``[B, S, *S]``; a guided first one fills two lanes."""
        self.x.copy_(x)
        guided_lanes = self.x_in.shape[1] - x.shape[1]
        self.x_in[:, guided_lanes:].copy_(x)
        if guided_lanes:
            self.x_in[:, :1].copy_(x[:, :1])
        if self.history is not None:
            self.history.zero_()

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        n: int,
        times: Tensor,
        coef: Tensor,
        guidance: float,
    ) -> None:
        """One evaluation and one solver step of the first n samples; times [n], coef [n, 5]."""
        v = velocity(self.x_in[:n], times).to(self.x_in.dtype)  # under autocast they may differ
        history = None if self.history is None else self.history[:n]
        ode_step_(self.x[:n], v.contiguous(), history, coef, guidance=guidance, x_in=self.x_in[:n])


def _integrate_with_grad(velocity, x, table, guidance, dtype) -> Tensor:
    """The same recurrence out of place; a few steps (student sampling), all samples together."""
    history = None
    for k in range(len(table.active)):
        v = velocity(x.to(dtype), table.times[k])
        x, history = reference.ode_step(x, v, history, table.coef[k], guidance)
    return x


def mean_velocity(
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    step_size: float = 0.02,
    solver: str = "euler",
    grid: int | None = None,
    cond: Any = None,
) -> Tensor:
    """Average of ``velocity`` along its own ODE from t down to r, started at x (the paper's AVF).

    Args:
        velocity: (x ``[B, *S]``, t ``[B]``) -> ``[B, *S]``; with ``cond`` it is called as
            velocity(x, t, cond).
        x: states at time t, ``[B, *S]`` float32 or float64.
        t, r: ``[B]`` float32 or float64, 0 <= r <= t <= 1; keep them on the CPU to avoid waiting
            for the device.  Times and coefficients are float64 where x is, and ``velocity`` sees
            them so.
        step_size: sample i takes N_i = ceil((t_i - r_i) / step_size) steps; t_i == r_i gives
            velocity(x, t).
        solver: ``"euler"`` (the paper), ``"heun"``, ``"ab2"`` or ``"dpmpp_2m"``.
        grid: round t, r and every step's end to multiples of 1/grid.
        cond: a pytree whose leaves have a leading batch dimension.  With it, samples that have
            arrived leave the batch (velocity sees the rows still moving, reordered); without it,
            velocity always sees all B rows in their order, because it may close over something per
            sample.

    Returns:
        u ``[B, *S]``; no gradient flows through it.  ``ValueError`` names what is out of range.
    """
    if x.ndim < 1 or t.shape != x.shape[:1] or r.shape != x.shape[:1]:
        raise ValueError(
            f"mean_velocity: t and r must be [B] for x [B, ...] = {list(x.shape)}; "
            f"got {list(t.shape)} and {list(r.shape)}"
        )
    t, r = (reference.wide_rows(time.to("cpu"), x) for time in (t, r))
    table = plan(t, r, step_size=step_size, solver=solver, grid=grid)
    compact = cond is not None
    if not compact:
        table = _unsorted(table)
    order = table.order
    start = x if order is None else x[order.to(x.device)]
    cond = tree_map(lambda leaf: leaf if order is None else leaf[order.to(leaf.device)], cond)

    def lane_velocity(x_in, time):
        rows = (tree_map(lambda leaf: leaf[: len(time)], cond),) if compact else ()
        return _checked(velocity(x_in[:, 0], time, *rows), x_in[:, 0])[:, None]

    with torch.no_grad():
        end = integrate(lane_velocity, start[:, None], table, compact=compact)[:, 0]
        weight, span = (
            reference.per_sample(row.to(x.device, x.dtype), x)
            for row in (table.start_weight, table.span)
        )
        u = (weight * start - end) / span
        return u if order is None else torch.empty_like(u).index_copy_(0, order.to(x.device), u)


def _checked(v: Tensor, x: Tensor) -> Tensor:
    if v.shape != x.shape:
        raise ValueError(
            f"velocity must return the shape of x, {list(x.shape)}; got {list(v.shape)}"
        )
    return v


def _unsorted(table: SolverTable) -> SolverTable:
    """The table in the samples' own order; arrived samples stay in the batch and stand still."""
    if table.order is None:
        return table
    back = torch.argsort(table.order)
    return SolverTable(
        times=table.times[:, back].contiguous(),
        coef=table.coef[:, back].contiguous(),
        active=table.active,
        order=None,
        span=table.span[back],
        start_weight=table.start_weight[back],
        has_history=table.has_history,
    )


def guided(velocity_cond: Velocity, velocity_uncond: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance ``v_u + scale (v_c - v_u)``; scale 1 is velocity_cond itself."""
    if scale == 1.0:
        return velocity_cond

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v_uncond = velocity_uncond(x, t)
        return v_uncond + scale * (velocity_cond(x, t) - v_uncond)

    return velocity


def generate(
    student_velocity: Velocity,
    noise: Tensor,
    *,
    steps: int = 1,
    solver: str = "euler",
    schedule: Schedule | None = None,
) -> Tensor:
    """Sample: integrate ``student_velocity`` from noise (t = 1) to data (t = 0) in ``steps`` steps.

    Args:
        student_velocity: (x ``[B, *S]``, t ``[B]``) -> ``[B, *S]``.
        noise: standard normal, ``[B, *S]`` float32 or float64.
        schedule: the times to visit (``flow.shifted_schedule``, ``flow.dpm_flow_schedule``); equal
            steps if None.

    Returns:
        x_0 ``[B, *S]``.  One Euler step is ``noise - velocity(noise, 1)``.  Gradients flow through
        all steps when they are enabled.
    """
    schedule = uniform_schedule(steps) if schedule is None else schedule
    if len(schedule.times) != steps:
        raise ValueError(f"steps={steps}, but the schedule has {len(schedule.times)} steps")
    dtype = torch.promote_types(noise.dtype, torch.float32)
    table = _scheduled_on(noise.device, schedule, noise.shape[0], solver, dtype)

    def lane_velocity(x_in, time):
        return _checked(student_velocity(x_in[:, 0], time), x_in[:, 0])[:, None]

    return integrate(lane_velocity, schedule.begin(noise)[:, None], table)[:, 0]


@lru_cache(maxsize=64)
def _scheduled_on(device, schedule: Schedule, batch: int, solver: str, dtype) -> SolverTable:
    """A few-step sampler uses one table for a whole run: made and moved once."""
    return scheduled(schedule, batch, solver=solver, dtype=dtype).to(device)
