"""How a student takes K steps from noise to data: as a flow, as a flow map, or with fresh noise.

    flow      x <- solver step of the velocity F(x, t)                  (mfd, vsd, reflow)
    map       x <- x + (s - t) F(x, t, s), s the next node of the grid   (ayf, meanflow, imm)
    renoise   x_0 = x - t F(x, t), then x <- (1 - s) x_0 + s eps         (cd, dmd2, senseflow)

One step from t = 1 to 0 is the same for all three: noise - F(noise, 1).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfd_fast.distill.config import DistillConfig
from mfd_fast.flow.integrate import generate
from mfd_fast.flow.solvers import EVALUATIONS_PER_STEP
from mfd_fast.flow.times import Schedule, uniform_schedule
from mfd_fast.ops import interpolate

Velocity = Callable[..., Tensor]  # (x [B, *S], t [B]) or, for a map, (x, t, s)
RENOISE_SEED = 0


def few_step(
    sampler: str,
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    solver: str = "euler",
    schedule: Schedule | None = None,
    fresh_noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Samples x_0 ``[B, *S]`` from noise ``[B, *S]`` in ``steps`` evaluations.

    Args:
        sampler: ``"flow"``, ``"map"`` or ``"renoise"``.
        velocity: (x, t) -> ``[B, *S]``; of a map it also takes the end s ``[B]`` of the step.
        solver: of a flow; the other two have no choice.
        schedule: the times to visit; equal steps if None.
        fresh_noise: draws eps like ``noise`` between two steps of ``"renoise"``; the same numbers
            in every call if None, so that a result can be repeated.
    """
    schedule = uniform_schedule(steps) if schedule is None else schedule
    if sampler == "renoise":
        states = renoised_states(velocity, noise, schedule, fresh_noise or _repeatable_noise(noise))
        *_, (x, t) = states
        return one_step(velocity, x, t)
    if sampler == "map":
        ends = iter(schedule.nodes[1:])
        return generate(
            lambda x, t: velocity(x, t, torch.full_like(t, next(ends))),
            noise,
            steps=steps,
            schedule=schedule,
        )
    return generate(velocity, noise, steps=steps, solver=solver, schedule=schedule)


def one_step(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    """x_0 = x - t F(x, t) ``[B, *S]``, t one number for all."""
    return generate(velocity, x, schedule=Schedule((t, 0.0), (t,)))


def renoised_states(
    velocity: Velocity, noise: Tensor, schedule: Schedule, fresh_noise: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, float]]:
    """The student's own noisy states (x, t), one for every step: the schedule's
    beginning, noise at t = 1, first.

    The next state costs an evaluation only when it is asked for (DMD2's backward simulation).
    """
    x = schedule.begin(noise)
    for k, t in enumerate(schedule.nodes[:-1]):
        if k:
            x0 = one_step(velocity, x, schedule.nodes[k - 1])
            x = interpolate(x0, fresh_noise(), torch.full((len(x),), t, device=x.device))
        yield x, t


def _repeatable_noise(like: Tensor) -> Callable[[], Tensor]:
    generator = torch.Generator(like.device).manual_seed(RENOISE_SEED)
    return lambda: torch.randn(
        like.shape, generator=generator, device=like.device, dtype=like.dtype
    )


@dataclass(frozen=True)
class StudentSampler:
    """``sampler(noise, cond) -> x_0``: a trained student network, sampled as its objective asks."""

    network: Callable[..., Tensor]
    config: DistillConfig
    kind: str

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample."""
        is_flow = self.kind == "flow"
        per_step = EVALUATIONS_PER_STEP[self.config.student_solver] if is_flow else 1
        return self.config.student_steps * per_step

    def __call__(self, noise: Tensor, cond: Any) -> Tensor:
        """Samples like ``noise`` ``[B, *S]`` under ``cond``."""
        return few_step(
            self.kind,
            lambda x, t, *end: self.network(x, t, cond, *end),
            noise,
            steps=self.config.student_steps,
            solver=self.config.student_solver,
        )
