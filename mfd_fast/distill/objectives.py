"""The interface of an objective, and the family that compares trajectories over [r, t]."""

from typing import Protocol

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.lanes import Backbone, Prepared, guided_lanes, trajectory_lanes
from mfd_fast.distill.config import DistillConfig
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import SolverTable
from mfd_fast.flow.times import on_grid, sample_times
from mfd_fast.ops import interpolate, mfd_loss_from_ends

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """Turns the student's samples into a loss whose gradient moves them.

    roles: what it trains, in the order of a cycle.
    sampler: how its student takes K steps (``sampling.few_step``).
    uses_data: whether the condition of an update is a pair (samples of the data, condition).
    second_time: whether its student takes the end of the step as a second time.
    """

    roles: tuple[str, ...]
    sampler: str
    uses_data: bool
    second_time: bool

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        """The times of one update; host random numbers only."""
        ...

    def student_loss(
        self, backbone: Backbone, prepared: Prepared, x0: Tensor, noise: Tensor, table: SolverTable
    ) -> tuple[Tensor, Metrics]:
        """Loss ``[]`` (differentiable in x0 ``[B, *S]``) and metrics, all on the device."""
        ...


class IntervalObjective:
    """Noise the sample to t, follow guided teacher and auxiliary to r, compare where they end.

        d loss / d x_t = weight (u_T - u_A) / numel      (Eq. 15-20; stop-gradient at both)

    A subclass draws the intervals and may weight the samples.  The three phases are separate so
    that each can be one CUDA graph (``captured.py``); ``student_loss`` is their composition.
    """

    roles = ("aux", "student")
    sampler = "flow"
    uses_data = second_time = False

    def __init__(self, config: DistillConfig):
        self.config = config
        self.lanes = trajectory_lanes(config.guidance)

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        raise AssertionError("a subclass of IntervalObjective draws its own intervals")

    def weight(self, t: Tensor) -> Tensor | None:
        """Per-sample factor of the gradient, from t ``[B]``; None for 1."""
        return None

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t ``[B, *S]``; the gradient flows to x0."""
        return interpolate(x0, noise, t)

    def velocity(self, backbone: Backbone, prepared: Prepared, x: Tensor, t: Tensor) -> Tensor:
        """Velocities of all lanes ``[n, L, *S]`` in one evaluation."""
        return guided_lanes(backbone, x, t, prepared, self.lanes, self.config.guidance)

    def starts(self, x_t: Tensor) -> Tensor:
        """Both trajectories, teacher and auxiliary, start at the same x_t: ``[B, 2, *S]``."""
        return x_t.detach()[:, None].expand(-1, 2, *x_t.shape[1:])

    def loss(self, x_t: Tensor, ends: Tensor, t: Tensor, span: Tensor) -> tuple[Tensor, Metrics]:
        """Compare the ends ``[B, 2, *S]``; differentiable in x_t."""
        loss, distance, _ = mfd_loss_from_ends(x_t, ends[:, 0], ends[:, 1], span, self.weight(t))
        return loss, {"student_loss": loss.detach(), "distance": distance.detach().mean()}

    def student_loss(self, backbone, prepared, x0, noise, table) -> tuple[Tensor, Metrics]:
        t = table.times[0]
        x_t = self.noised(x0, noise, t)
        with torch.no_grad():
            ends = integrate(
                lambda x, time: self.velocity(backbone, prepared, x, time),
                self.starts(x_t),
                table,
                guidance=self.config.guidance,
                num_lanes=len(self.lanes),
                dtype=backbone.dtype,
            )
        return self.loss(x_t, ends, t, table.span)


def aux_times(batch: int, config: DistillConfig, generator: Generator) -> Tensor:
    """Times ``[batch]`` of the auxiliary's flow matching, on the config's grid."""
    t = sample_times(
        batch,
        config.aux_time_distribution,
        mean=config.aux_time_mean,
        std=config.aux_time_std,
        generator=generator,
    )
    return on_grid(t, config.grid)
