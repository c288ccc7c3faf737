"""One cycle of an objective that MFD is compared with, traced on a backbone without storage.

What an update computes depends on its host random numbers alone: which step of the student's
sampler is trained, how far the teacher integrates.  The first cycles of the run are followed with
networks that compute nothing; every kind of micro-batch that they hold is then traced once and
weighted by how often it came.  The teacher is traced for one step of its integrations; the others
are put together as those of mfd.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mfd_fast.backbones.lanes import CopiedBackbone, Prepared, in_parts, trajectory_lanes
from mfd_fast.baselines.batch import Batch, Fields
from mfd_fast.baselines.distiller import ComparisonDistiller
from mfd_fast.cost.cycle import (
    CycleCost,
    Traced,
    bytes_that_stay,
    gradients_of,
    solver_steps,
    updates_of,
    weighted,
)
from mfd_fast.cost.trace import Memory, Trace, Work
from mfd_fast.distill.config import DistillConfig
from mfd_fast.flow.solvers import plan
from mfd_fast.run.task import Shapes

STUDENT_UPDATES = 64  # that are followed for their draws, at least


@dataclass(frozen=True)
class OneStep(Fields):
    """Fields whose teacher integrates in one evaluation.

    draws: what it was asked for and what it did is noted there; nowhere if None.
    """

    draws: "Draws | None"

    def teacher_end(self, x: Tensor, t: Tensor, r: Tensor, config: DistillConfig) -> Tensor:
        if self.draws is not None:
            asked = plan(t, r, step_size=config.step_size, solver=config.solver)
            self.draws.asked.update(asked.active)
            self.draws.made[len(x)] += 1
        return super().teacher_end(x, t, t, config)


class MetaComparison(Traced, ComparisonDistiller):
    """A ``ComparisonDistiller`` without storage whose teacher integrates in one evaluation."""

    def __init__(self, model: Shapes, config: DistillConfig):
        super().__init__(model.backbone, config, schedule=model.schedule)
        self.draws: Draws | None = None

    def _batch(self, cond: Any) -> Batch:
        batch = super()._batch(cond)
        return replace(batch, fields=OneStep(**vars(batch.fields), draws=self.draws))

    def part(self, role: str, cond: Any) -> None:
        """Forward and backward of the first micro-batch of an update of the role."""
        part = in_parts(cond, self.config.micro_batches)[0]
        if role == "aux":
            self._aux_backward(part, self._draw_aux_times(part))
        else:
            self._student_backward(part)

    def finish(self, role: str) -> None:
        """What follows the micro-batches of an update."""
        self._apply(role)


@dataclass
class Kind:
    """Micro-batches of a role that evaluate the same networks on the same numbers of rows.

    state: the host generator before the first of them; count: how many came.
    """

    state: Tensor
    count: int = 0


@dataclass
class Draws:
    """The micro-batches of a role in some cycles of a run.

    kinds: evaluations of networks, in order -> the micro-batches that make them.
    asked: n -> evaluations of n samples that integrations of the teacher take; made: of these, how
        many the traced ones take.
    """

    kinds: dict[tuple, Kind] = field(default_factory=dict)
    asked: Counter = field(default_factory=Counter)
    made: Counter = field(default_factory=Counter)


def trace_compared(
    model: Shapes, config: DistillConfig, batch: int, *, cycles: int | None = None
) -> CycleCost:
    """:func:`trace_cycle` for a ``ComparedObjective``: the mean of the run's first cycles.

    Args:
        cycles: how many; as many as have ``STUDENT_UPDATES`` student updates if None.

    ``ValueError`` if the objective cannot train this backbone or this batch.
    """
    cycles = -(-STUDENT_UPDATES // config.student_updates) if cycles is None else cycles
    distiller, cond = MetaComparison(model, config), model.cond(batch)
    with Trace(counts_work=False) as first:  # gradients and tables are made now and stay
        for role in distiller.roles:
            (distiller.aux_step if role == "aux" else distiller.student_step)(cond)
    rows, followed = batch // config.micro_batches, followed_draws(config, batch, cycles)
    phases: dict[str, Work] = {}
    memory = Memory()

    def trace(run: Callable[[], None], times: int) -> None:
        with Trace() as found:
            distiller.listen(found)
            run()
        for name, work in found.work.items():
            if name:
                phases.setdefault(name, Work()).add(work, times)
        memory.peak |= found.memory.peak

    for role, draws in followed.items():
        for kind in draws.kinds.values():
            distiller.host_generator.set_state(kind.state)
            trace(lambda role=role: distiller.part(role, cond), kind.count)
        trace(lambda role=role: distiller.finish(role), cycles * updates_of(config, role))
        missing = Counter(draws.asked)
        missing.subtract(draws.made)
        if missing:
            steps = _teacher_steps(distiller, model.cond(rows), config)
            phases[f"{role}/forward"].add(weighted(steps, missing))
    phases = {name: Work().add(work, 1 / cycles) for name, work in phases.items()}
    parts = cycles * config.student_updates * config.micro_batches
    evaluations = sum(n * count for n, count in followed["student"].asked.items()) / rows / parts
    persistent, gradients = bytes_that_stay(distiller, first.memory), gradients_of(distiller)
    return CycleCost(batch, phases, evaluations, persistent, memory, gradients)


@lru_cache(maxsize=64)
def followed_draws(config: DistillConfig, batch: int, cycles: int) -> Mapping[str, Draws]:
    """role -> what the first ``cycles`` cycles of updates of ``batch`` samples draw."""
    calls: list[tuple] = []
    backbone = CopiedBackbone(
        *(Silent(role, calls) for role in ("teacher", "aux", "student")),
        sample_shape=(1, 1, 1),
        null_cond=lambda cond: cond,
    )
    distiller = MetaComparison(Shapes(backbone, None), config)
    cond = torch.empty(batch, 0)
    if distiller.objective.uses_data:
        cond = (torch.zeros(batch, 1, 1, 1), cond)
    found = {role: Draws() for role in distiller.roles}
    for _ in range(cycles):
        for role, draws in found.items():
            for _ in range(updates_of(config, role) * config.micro_batches):
                calls.clear()
                distiller.draws = draws
                state = distiller.host_generator.get_state()
                distiller.part(role, cond)
                draws.kinds.setdefault(tuple(calls), Kind(state)).count += 1
    return found


class Silent(nn.Module):
    """A network that computes nothing and notes who was evaluated, on how many rows and how."""

    middle_width = 1

    def __init__(self, role: str, calls: list[tuple]):
        super().__init__()
        self.role, self.calls = role, calls
        self.factor = nn.Parameter(torch.ones(()))
        self.middle = nn.Identity()

    def forward(self, x: Tensor, t: Tensor, cond: Any, *end: Tensor) -> Tensor:
        """x ``[B, 1, 1, 1]`` times a parameter; ``middle`` is ``[B, 1, 1]``."""
        self.calls.append((self.role, len(x), torch.is_grad_enabled()))
        return self.middle(x.flatten(2) * self.factor).view_as(x)


def _teacher_steps(distiller: MetaComparison, cond: Any, config: DistillConfig) -> dict[int, Work]:
    """One step of ``Fields.teacher_end`` by the number of samples still moving."""
    backbone, lanes = distiller.backbone, trajectory_lanes(config.guidance)[:-1]
    own = backbone.prepare(cond[1] if distiller.objective.uses_data else cond)
    prepared = Prepared(own.cond, own.null, own.batch)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return backbone.forward(x, t, prepared, lanes)

    return solver_steps(velocity, backbone, own.batch, (1, len(lanes)), config)
