"""The interface of an objective, and the one way teacher and auxiliary are compared."""

from typing import Protocol

import torch
from torch import Generator, Tensor

from mfd_fast.backbone import Backbone, Prepared, trajectory_lanes
from mfd_fast.integrate import integrate
from mfd_fast.ops import interpolate, mfd_loss_from_ends
from mfd_fast.solvers import SolverTable


class Objective(Protocol):
    """Turns the student's samples into a loss whose gradient moves them."""

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        """The intervals [r, t] of one update and how they are integrated; host random numbers only."""
        ...

    def student_loss(
        self, backbone: Backbone, prepared: Prepared, x0: Tensor, noise: Tensor, table: SolverTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[]`` (differentiable in x0 ``[B, *S]``) and metrics, all on the device."""
        ...


def match_mean_velocities(
    backbone: Backbone,
    prepared: Prepared,
    x0: Tensor,
    noise: Tensor,
    table: SolverTable,
    *,
    guidance: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise x0 to t, integrate guided teacher and auxiliary to r together, compare their ends.

    Args:
        x0, noise: ``[B, *S]`` float32; the gradient flows to x0 through x_t only (Eq. 15-20: the
            Jacobians of the two ODE solves are omitted).
        table: one row per sample, sorted (``solvers.plan``).
        weight: per-sample factor of the gradient, ``[B]``, or None.
    """
    t = table.times[0]
    x_t = interpolate(x0, noise, t)
    lanes = trajectory_lanes(guidance)
    with torch.no_grad():
        ends = integrate(
            lambda x, time: backbone.forward(x, time, prepared, lanes),
            torch.stack([x_t, x_t], dim=1),
            table,
            guidance=guidance,
            num_lanes=len(lanes),
            dtype=backbone.dtype,
        )
    loss, distance, _ = mfd_loss_from_ends(x_t, ends[:, 0], ends[:, 1], table.span, weight)
    return loss, {"student_loss": loss.detach(), "distance": distance.detach().mean()}
