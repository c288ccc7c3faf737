"""Savings of evaluations that are tried here and are no settings of the package.

several ends    one trajectory from t serves several r: with t the larger of two independent times,
                the smaller is one draw below t; drawing more of them below the same t leaves every
                pair (t, r_j) its law, so the mean of their gradients has the same expectation, and
                the nodes of the longest trajectory pass through all of them
two nodes       every interval takes two AB2 steps, however long: u = v_0 / 4 + 3 v_1 / 4
by need         as many auxiliary updates as keep its lag (its loss after the student moved, over
                that at the end of the cycle) below a bound
"""

from itertools import pairwise

import torch
from torch import Generator, Tensor
from torch.distributions import Normal

from mfd_fast.backbones.lanes import AUX, TEACHER, Backbone, Prepared
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.objectives import MeanFlowDistillation, Metrics, time_pairs
from mfd_fast.flow.integrate import mean_velocity
from mfd_fast.flow.solvers import SolverTable, num_steps, plan
from mfd_fast.ops import mfd_loss

LAG_EVERY = 10  # student updates behind one decision
MOST_UPDATES = 10


def smaller_times(t: Tensor, draws: int, mean: float, std: float, generator: Generator) -> Tensor:
    """``[draws, B]``: independent logit-normal times below t ``[B]``, by their inverse CDF."""
    normal = Normal(mean, std)
    share = torch.rand(draws, len(t), generator=generator, dtype=torch.float64)
    below = normal.icdf(share.clamp(min=1e-12) * normal.cdf(torch.logit(t.double())))
    return torch.sigmoid(below).to(t.dtype).minimum(t)


class SeveralEnds(MeanFlowDistillation):
    """``ENDS`` intervals [r_j, t] from one trajectory of each role; without guidance."""

    ENDS = 3

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        """The table of the longest intervals; ``ends`` ``[ENDS, B]``, descending, beside it."""
        config = self.config
        t, r = time_pairs(batch, config, generator, 0.0)
        more = smaller_times(t, self.ENDS - 1, config.time_mean, config.time_std, generator)
        self.t, self.ends = t, torch.cat([r[None], more]).sort(0, descending=True).values
        return plan(t, self.ends[-1], step_size=config.step_size).assigned_in_order()

    def evaluations(self, draws: int = 4096) -> float:
        """Expected evaluations of a lane: the steps from each end to the next."""
        self.draw(draws, Generator().manual_seed(0))
        nodes = [self.t, *self.ends]
        step = self.config.step_size
        steps = [num_steps(a, b, step_size=step) for a, b in pairwise(nodes)]
        return sum(int(s.sum()) for s in steps) / draws

    def student_loss(
        self, backbone: Backbone, prepared: Prepared, x0: Tensor, noise: Tensor, table: SolverTable
    ) -> tuple[Tensor, Metrics]:
        x_t = self.noised(x0, noise, self.t)
        means = [self._means(backbone, prepared, x_t.detach(), lane) for lane in (TEACHER, AUX)]
        loss = torch.stack([mfd_loss(x_t, *pair) for pair in zip(*means, strict=True)]).mean()
        distance = (means[0][0] - means[1][0]).flatten(1).norm(dim=1).mean()
        return loss, {"student_loss": loss.detach(), "distance": distance}

    def _means(self, backbone: Backbone, prepared: Prepared, x: Tensor, lane) -> list[Tensor]:
        """u over [r_j, t] for every j, from one trajectory."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return backbone.forward(x[:, None], t, prepared, (lane,))[:, 0]

        start, before, means = x, self.t, []
        for r in self.ends:
            u = mean_velocity(
                velocity, x, before, r, step_size=self.config.step_size, solver=self.config.solver
            )
            x = x - (before - r)[:, None] * u
            means.append((start - x) / (self.t - r).clamp(min=1e-6)[:, None])
            before = r
        return means


class TwoNodes(MeanFlowDistillation):
    """Two AB2 steps for every interval; without guidance."""

    def evaluations(self) -> float:
        """Of a lane."""
        return 2.0

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        self.t, self.r = time_pairs(batch, self.config, generator, 0.0)
        return plan(self.t, self.r, step_size=1.0).assigned_in_order()

    def student_loss(
        self, backbone: Backbone, prepared: Prepared, x0: Tensor, noise: Tensor, table: SolverTable
    ) -> tuple[Tensor, Metrics]:
        x_t = self.noised(x0, noise, self.t)
        with torch.no_grad():
            v = backbone.forward(self.starts(x_t), self.t, prepared, self.lanes)
            half = ((self.t - self.r) / 2)[:, None, None]
            middle = backbone.forward(
                self.starts(x_t) - half * v, (self.t + self.r) / 2, prepared, self.lanes
            )
            teacher, aux = (0.25 * v + 0.75 * middle).unbind(1)
        loss = mfd_loss(x_t, teacher, aux)
        distance = (teacher - aux).flatten(1).norm(dim=1).mean()
        return loss, {"student_loss": loss.detach(), "distance": distance}


class ByNeed:
    """How many auxiliary updates the next cycles take: one fewer while the lag is below ``bound``,
    one more while it is not; at least two, for the lag is a ratio of two of them.
    """

    def __init__(self, updates: int, bound: float = 0.05):
        self.updates, self.bound = updates, bound
        self.made = self.cycles = 0
        self._first = self._last = 0.0

    def cycle(self, distiller: Distiller, cond: Tensor) -> None:
        """One cycle of the distiller."""
        losses = [distiller.aux_step(cond)["aux_loss"].item() for _ in range(self.updates)]
        distiller.student_step(cond)
        self.made, self.cycles = self.made + self.updates, self.cycles + 1
        self._first, self._last = self._first + losses[0], self._last + losses[-1]
        if self.cycles % LAG_EVERY == 0:
            lag = self._first / self._last - 1
            step = -1 if lag < self.bound else 1
            self.updates = min(max(self.updates + step, 2), MOST_UPDATES)
            self._first = self._last = 0.0
