"""What one cycle of updates does, traced on a backbone without storage: work and memory by phase.

The trace runs the ``Distiller`` itself.  Only the integration is put together: one step is traced
for several numbers of samples still moving, and weighted by how often the run's own draws of (t, r)
ask for each.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from mfd_fast.backbones.lanes import Backbone, Lane, batch_size, trajectory_lanes
from mfd_fast.cost.operators import stored_bytes
from mfd_fast.cost.trace import Memory, Op, Trace, Work
from mfd_fast.distill.config import DistillConfig, OptimConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.objectives import OBJECTIVES, make_objective
from mfd_fast.flow.integrate import Trajectories
from mfd_fast.flow.solvers import EVALUATIONS_PER_STEP, SolverTable, plan
from mfd_fast.run.task import Shapes

DRAWS = 4096  # pairs (t, r) that are drawn for the expected numbers of evaluations
INTEGRATE = "student/integrate"

# Bytes of optimizer state per parameter: two float32 moments; or two 8-bit ones with a float32
# scale for every block of 256 (bitsandbytes, torchao).
MOMENT_BYTES = {
    "adamw": 8.0,
    "fused_adam": 8.0,
    "adamw8bit": 2 + 2 * 4 / 256,
    "adamw8bit_torchao": 2 + 2 * 4 / 256,
}


class MetaOptimizer(Optimizer):
    """AdamW of one kind without storage: its step is charged to the trace, nothing is computed."""

    def __init__(self, parameters: list[nn.Parameter], config: OptimConfig):
        super().__init__(parameters, {"lr": config.lr, "fused": True})
        self.kind = config.kind
        self.trace: Trace | None = None

    def step(self) -> None:
        if self.trace is None:
            return
        (group,) = self.param_groups
        moved = sum(
            p.numel() * (3 * p.element_size() + 2 * moment_bytes(self.kind))
            for p in group["params"]
        )
        self.trace.record(Op(self.kind, "optimizer", torch.float32, 0.0, moved))


def moment_bytes(kind: str) -> float:
    """Bytes of optimizer state per parameter; ``ValueError`` for a kind that is not known here."""
    if kind not in MOMENT_BYTES:
        raise ValueError(f"the state of optimizer {kind!r} is not known; {sorted(MOMENT_BYTES)} is")
    return MOMENT_BYTES[kind]


class Traced:
    """A distiller whose phases and optimizer steps can be charged to a trace."""

    def _make_optimizer(self, role: str) -> Optimizer:
        return MetaOptimizer(self.parameters_of(role), self.config.optim_of(role))

    def listen(self, trace: Trace) -> None:
        """Charge phases and optimizer steps to ``trace``."""
        self.phase = trace.phase
        for optimizer in self.optimizers.values():
            optimizer.trace = trace


class MetaDistiller(Traced, Distiller):
    """A ``Distiller`` without storage whose integrations take one evaluation."""

    def __init__(self, model: Shapes, config: DistillConfig):
        super().__init__(model.backbone, config, schedule=model.schedule)

    def _draw_table(self, cond: Any) -> SolverTable:
        half = torch.full((batch_size(cond),), 0.5)
        return plan(half, half, step_size=self.config.step_size, solver=self.config.solver)


@dataclass
class CycleCost:
    """One cycle at one batch size.

    phases: expected work of every phase, all its updates of the cycle together.
    evaluations: expected ODE evaluations of one lane of one sample in a student update; 0 if the
        objective draws no interval.
    persistent: bytes by component of what stays from update to update.
    memory: what was alive above that, by phase.
    gradients: role that is trained -> bytes of its gradients, what several GPUs sum in an update.
    """

    batch: int
    phases: dict[str, Work]
    evaluations: float
    persistent: dict[str, float]
    memory: Memory
    gradients: dict[str, float]

    @property
    def total(self) -> Work:
        """All phases together."""
        total = Work()
        for work in self.phases.values():
            total.add(work)
        return total


def trace_cycle(model: Shapes, config: DistillConfig, batch: int) -> CycleCost:
    """Trace the updates of one cycle for ``batch`` samples an update.

    ``ValueError`` if the batch does not divide into ``config.micro_batches``, or if the objective
    cannot train this backbone.
    """
    if not is_interval(config):
        from mfd_fast.cost.compared import trace_compared  # it is built from the parts below

        return trace_compared(model, config, batch)
    distiller, cond = MetaDistiller(model, config), model.cond(batch)
    with Trace(counts_work=False) as first:  # gradients, tables and plans are made now and stay
        distiller.aux_step(cond)
        distiller.student_step(cond)
    share = adapter_share(model.backbone, distiller.objective.lanes)
    with Trace({INTEGRATE: share}) as trace:
        distiller.listen(trace)
        distiller.aux_step(cond)
        distiller.student_step(cond)
    phases = {
        name: Work().add(work, updates_of(config, name))
        for name, work in trace.work.items()
        if name
    }
    parts = config.micro_batches
    rows = batch // parts
    counts = Counter(expected_evaluations(config, rows))
    evaluations = evaluations_of_lane(config, rows)
    counts[rows] -= 1.0  # the one that was traced
    steps = _trace_steps(distiller, model.cond(rows), share, config)
    phases[INTEGRATE].add(weighted(steps, counts), parts * config.student_updates)
    persistent, gradients = bytes_that_stay(distiller, first.memory), gradients_of(distiller)
    return CycleCost(batch, phases, evaluations, persistent, trace.memory, gradients)


def weighted_cycles(terms: list[tuple[int, CycleCost]]) -> CycleCost:
    """The cycle whose work and bytes are the sum of those of others, each times its weight.

    Exact where every part is linear in the weights: work, what stays, and the memory of a phase
    that peaks at the same place in all of them.
    """
    if len(terms) == 1:
        return terms[0][1]
    first, memory = terms[0][1], Memory()
    for name in first.memory.peak:
        memory.peak[name] = sum(n * cycle.memory.peak[name] for n, cycle in terms)
        memory.at_entry[name] = sum(n * cycle.memory.at_entry[name] for n, cycle in terms)

    def together(field: str) -> dict[str, float]:
        parts = [(n, getattr(cycle, field)) for n, cycle in terms]
        return {name: sum(n * part[name] for n, part in parts) for name in parts[0][1]}

    phases = {name: Work() for name in first.phases}
    for n, cycle in terms:
        for name, work in cycle.phases.items():
            phases[name].add(work, n)
    return CycleCost(
        *(first.batch, phases, first.evaluations, together("persistent"), memory),
        together("gradients"),
    )


def is_interval(config: DistillConfig) -> bool:
    """Whether ``Distiller`` trains by the objective: captured, and in many processes, if asked."""
    return config.objective in OBJECTIVES


@lru_cache(maxsize=64)
def expected_evaluations(config: DistillConfig, rows: int) -> Mapping[int, float]:
    """n -> expected evaluations of an update of ``rows`` samples at which n of them still move."""
    objective = make_objective(config)
    generator = Generator().manual_seed(0)
    updates = max(8, DRAWS // rows)
    counts: Counter = Counter()
    for _ in range(updates):
        counts.update(objective.draw(rows, generator).active)
    return {n: count / updates for n, count in counts.items()}


def evaluations_of_lane(config: DistillConfig, rows: int = 1) -> float:
    """E[N]: expected evaluations of one lane of one sample in a student update."""
    return sum(n * count for n, count in expected_evaluations(config, rows).items()) / rows


def forward_evaluations(config: DistillConfig, of_lane: float) -> dict[str, float]:
    """phase -> expected forward evaluations of a network for one sample in a cycle.

    Args:
        of_lane: E[N], of ``evaluations_of_lane``.

    A backward pass is not one; each of several draws is.
    """
    of_sampler = config.student_steps * EVALUATIONS_PER_STEP[config.student_solver]
    lanes = len(trajectory_lanes(config.guidance))
    return {
        "aux/generate": config.aux_generations * of_sampler,
        "aux/forward": config.aux_updates * config.aux_draws_per_sample,
        "student/generate": config.student_updates * of_sampler,
        INTEGRATE: config.student_updates * lanes * of_lane,
    }


def network_calls(config: DistillConfig, rows: int) -> dict[str, float]:
    """phase -> expected passes through a network's blocks in a cycle, all samples and lanes of
    ``rows`` samples together; a backward is one pass for each evaluation that it enters.
    """
    of_sampler = config.student_steps * EVALUATIONS_PER_STEP[config.student_solver]
    parts, student = config.micro_batches, config.micro_batches * config.student_updates
    enters = of_sampler if config.student_backprop == "all" else of_sampler / config.student_steps
    return {
        "aux/generate": parts * config.aux_generations * of_sampler,
        **dict.fromkeys(("aux/forward", "aux/backward"), float(parts * config.aux_updates)),
        "student/generate": student * of_sampler,
        INTEGRATE: student * sum(expected_evaluations(config, rows).values()),
        "student/backward": student * enters,
    }


def adapter_share(backbone: Backbone, lanes: tuple[Lane, ...]) -> float:
    """Lanes that use an adapter among ``lanes``; 1 for a backbone without adapters."""
    adapters_of = getattr(backbone, "adapters_of", None)
    if adapters_of is None:
        return 1.0
    return sum(bool(adapters_of[lane.role]) for lane in lanes) / len(lanes)


def _trace_steps(
    distiller: MetaDistiller, cond: Any, share: float, config: DistillConfig
) -> dict[int, Work]:
    """One evaluation and one solver step for 1, 4, 16, ... and all samples still moving."""
    backbone, objective = distiller.backbone, distiller.objective
    with torch.no_grad():
        prepared = backbone.prepare(cond)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return objective.velocity(backbone, prepared, x, t)

    lanes = (2, len(objective.lanes))
    return solver_steps(velocity, backbone, prepared.batch, lanes, config, share)


@torch.no_grad()
def solver_steps(
    velocity: Callable[[Tensor, Tensor], Tensor],
    backbone: Backbone,
    rows: int,
    lanes: tuple[int, int],
    config: DistillConfig,
    share: float = 1.0,
) -> dict[int, Work]:
    """One step of ``integrate`` for 1, 4, 16, ... and ``rows`` samples still moving.

    Args: lanes: trajectories of a sample, and lanes that see them; share: of rows with an adapter.
    """
    sizes = sorted({rows, *(4**k for k in range(rows.bit_length()) if 4**k < rows)})
    moving = Trajectories.like(
        torch.empty(rows, lanes[0], *backbone.sample_shape, device=backbone.device),
        lanes[1],
        backbone.dtype,
        has_history=config.solver != "euler",
    )
    times, coef = (torch.empty(rows, *tail, device=backbone.device) for tail in ((), (5,)))
    moving.step(velocity, rows, times, coef, config.guidance)  # conditions of all rows are made now
    work = {}
    for n in sizes:
        with Trace({INTEGRATE: share}) as trace, trace.phase(INTEGRATE):
            moving.step(velocity, n, times[:n], coef[:n], config.guidance)
        work[n] = trace.work[INTEGRATE]
    return work


def weighted(steps: dict[int, Work], counts: Counter) -> Work:
    """The sum over n of counts[n] steps of n samples, linear between the sizes that were traced."""
    total, sizes = Work(), sorted(steps)
    for n, count in counts.items():
        above = next(size for size in sizes if size >= n)
        below = max((size for size in sizes if size <= n), default=above)
        part = 0.0 if above == below else (n - below) / (above - below)
        total.add(steps[above], count * part if above != below else count)
        if above != below:
            total.add(steps[below], count * (1 - part))
    return total


def updates_of(config: DistillConfig, phase: str) -> int:
    """Of the role, or of the role of the phase, in a cycle."""
    if phase == "aux/generate":
        return config.aux_generations
    return config.aux_updates if phase.startswith("aux") else config.student_updates


def bytes_that_stay(distiller: Distiller, first: Memory) -> dict[str, float]:
    """Bytes that stay, by component; ``first`` watched the first update of each role."""
    backbone = distiller.backbone
    trained = {role: distiller.parameters_of(role) for role in distiller.roles}
    flat = [p for parameters in trained.values() for p in parameters]
    own = {id(p) for p in flat}
    tensors = [*backbone.parameters(), *backbone.buffers()]
    gradients = sum(stored_bytes(p.grad) for p in flat if p.grad is not None)
    return {
        "weights": float(_distinct([x for x in tensors if id(x) not in own])),
        "trained weights": float(_distinct(flat)),
        "gradients": float(gradients),
        "optimizer": sum(
            p.numel() * moment_bytes(distiller.optimizers[role].kind)
            for role, parameters in trained.items()
            for p in parameters
        ),
        "average": float(_distinct(distiller.ema)),
        "tables": float(first.live - gradients),
    }


def gradients_of(distiller: Distiller) -> dict[str, float]:
    """Role that is trained -> bytes of its gradients."""
    return {
        role: float(sum(stored_bytes(p) for p in distiller.parameters_of(role)))
        for role in distiller.roles
    }


def _distinct(tensors: list[Tensor]) -> int:
    storages = [x.untyped_storage() for x in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())
