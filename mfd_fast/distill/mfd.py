"""Mean Flow Distillation (Eq. 15-20): match mean velocities over random intervals [r, t].

d loss / d x_t = (u_T - u_A) / numel,   u = (x_t - Phi(x_t; t -> r)) / (t - r)
"""

from torch import Generator

from mfd_fast.distill.objectives import IntervalObjective
from mfd_fast.flow.solvers import SolverTable, plan
from mfd_fast.flow.times import sample_time_pairs


class MeanFlowDistillation(IntervalObjective):
    """Pairs (t, r) of two independent draws; every sample has its own number of steps."""

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        """Pairs are independent of the samples, so they are sorted, never the samples."""
        config = self.config
        t, r = sample_time_pairs(
            batch,
            config.time_distribution,
            mean=config.time_mean,
            std=config.time_std,
            equal_fraction=config.equal_fraction,
            min_interval=config.min_interval,
            max_interval=config.max_interval,
            generator=generator,
        )
        table = plan(
            t, r, step_size=config.step_size, solver=config.solver, grid=config.grid or None
        )
        return table.assigned_in_order()
