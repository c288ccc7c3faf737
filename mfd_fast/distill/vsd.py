"""Variational score distillation in velocity form (Diff-Instruct): instantaneous velocities at t.

    d loss / d x_t = w(t) (v_T - v_A) / numel

w = 1 is the velocity form the MFD paper compares with; ``score_weighting`` takes w = (1 - t)/t, the
score difference of the KL form.  It is MFD at r = t.
"""

from torch import Generator, Tensor

from mfd_fast.distill.objectives import IntervalObjective
from mfd_fast.flow.solvers import SolverTable, plan
from mfd_fast.flow.times import sample_times


class VariationalScoreDistillation(IntervalObjective):
    """Intervals of no length: one evaluation per lane."""

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        config = self.config
        t = sample_times(
            batch,
            config.time_distribution,
            mean=config.time_mean,
            std=config.time_std,
            generator=generator,
        )
        return plan(t, t, step_size=config.step_size, grid=config.grid or None)

    def weight(self, t: Tensor) -> Tensor | None:
        return (1 - t) / t if self.config.score_weighting else None
