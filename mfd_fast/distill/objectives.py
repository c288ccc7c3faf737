"""What moves the student: teacher and auxiliary are compared over intervals [r, t].

mfd    mean velocities over random intervals (Mean Flow Distillation, Eq. 15-20)
vsd    instantaneous velocities: the limit r = t (variational score distillation)
"""

from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.lanes import Backbone, Prepared, guided_lanes, trajectory_lanes
from mfd_fast.distill.config import DistillConfig
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import SolverTable, plan
from mfd_fast.flow.times import on_grid, sample_time_pairs, sample_times
from mfd_fast.ops import interpolate, mfd_loss_from_ends

Metrics = dict[str, Tensor]


class IntervalObjective:
    """Noise the sample to t, follow guided teacher and auxiliary to r, compare where they end.

        d loss / d x_t = weight (u_T - u_A) / numel      (Eq. 15-20; stop-gradient at both)

    A subclass draws the intervals and may weight the samples.  The three phases are separate so
    that each can be one CUDA graph (``captured.py``); ``student_loss`` is their composition.
    """

    roles = ("aux", "student")  # what it trains, in the order of a cycle

    def __init__(self, config: DistillConfig):
        self.config = config
        self.lanes = trajectory_lanes(config.guidance)

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        """The intervals of one update; host random numbers only."""
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

    def student_loss(
        self, backbone: Backbone, prepared: Prepared, x0: Tensor, noise: Tensor, table: SolverTable
    ) -> tuple[Tensor, Metrics]:
        """Loss ``[]`` (differentiable in x0 ``[B, *S]``) and metrics, all on the device."""
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


class MeanFlowDistillation(IntervalObjective):
    """Mean Flow Distillation: u = (x_t - Phi(x_t; t -> r)) / (t - r) at teacher and auxiliary.

    Pairs (t, r) are two independent draws; every sample has its own number of steps.
    """

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        """Pairs are independent of the samples, so they are sorted, never the samples."""
        config = self.config
        limits = {"min_interval": config.min_interval, "max_interval": config.max_interval}
        t, r = time_pairs(batch, config, generator, config.equal_fraction, **limits)
        table = plan(
            t, r, step_size=config.step_size, solver=config.solver, grid=config.grid or None
        )
        return table.assigned_in_order()


class VariationalScoreDistillation(IntervalObjective):
    """Variational score distillation in velocity form (Diff-Instruct): MFD at r = t, one
    evaluation per lane.

        d loss / d x_t = w(t) (v_T - v_A) / numel

    w = 1 is the velocity form the MFD paper compares with; ``score_weighting`` takes
    w = (1 - t)/t, the score difference of the KL form.
    """

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        config, t = self.config, times(batch, self.config, generator)
        return plan(t, t, step_size=config.step_size, grid=config.grid or None)

    def weight(self, t: Tensor) -> Tensor | None:
        return (1 - t) / t if self.config.score_weighting else None


OBJECTIVES = {"mfd": MeanFlowDistillation, "vsd": VariationalScoreDistillation}


def make_objective(config: DistillConfig) -> IntervalObjective:
    """The objective that ``config.objective`` names; ``ValueError`` for one that is not here."""
    if config.objective not in OBJECTIVES:
        raise ValueError(
            f"Distiller trains by interval objectives; for distill.objective="
            f"{config.objective!r} call make_distiller(backbone, config)"
        )
    return OBJECTIVES[config.objective](config)


def times(batch: int, config: DistillConfig, generator: Generator) -> Tensor:
    """t ``[batch]`` by the config's distribution."""
    shape = {"mean": config.time_mean, "std": config.time_std}
    return sample_times(batch, config.time_distribution, generator=generator, **shape)


def time_pairs(
    batch: int, config: DistillConfig, generator: Generator, equal_fraction: float, **limits: Any
) -> tuple[Tensor, Tensor]:
    """t >= r, each ``[batch]``, by the config's distribution (``flow.times.sample_time_pairs``)."""
    limits |= {"mean": config.time_mean, "std": config.time_std, "equal_fraction": equal_fraction}
    return sample_time_pairs(batch, config.time_distribution, generator=generator, **limits)


def aux_times(batch: int, config: DistillConfig, generator: Generator) -> Tensor:
    """Times ``[batch]`` of the auxiliary's flow matching, on the config's grid."""
    shape = {"mean": config.aux_time_mean, "std": config.aux_time_std}
    t = sample_times(batch, config.aux_time_distribution, generator=generator, **shape)
    return on_grid(t, config.grid)
