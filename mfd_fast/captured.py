"""The distillation step as CUDA graphs: nothing is launched from Python in steady state.

    auxiliary update    one graph: generate, noise, forward, backward, clip, optimizer, average
    student update      one graph: what is constant along the trajectories
                        one graph: generate with gradient, noise to t
                        one graph per number of samples still moving, replayed once per ODE step
                        one graph: loss, backward, clip, optimizer, average

The host only draws times, copies them down and decides which graph comes next; that is known
without asking the device, because (t, r) are host random numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mfd_fast.backbone import FixedRows
from mfd_fast.distiller import Distiller
from mfd_fast.graphs import CapturedStep, CudaGraph, Graph
from mfd_fast.integrate import Trajectories
from mfd_fast.networks import evaluating
from mfd_fast.objectives import IntervalObjective
from mfd_fast.optim import is_capturable
from mfd_fast.solvers import EVALUATIONS_PER_STEP, SolverTable, plan


class CapturedDistiller(Distiller):
    """A :class:`Distiller` whose updates run as graphs after three warm-up updates.

    Args: those of ``Distiller``, and
        graph: makes a graph; CUDA graphs if None.  ``RecordedGraph`` runs the same logic on the
            CPU.

    The batch size must stay what it was in the first update.  An optimizer that cannot be captured
    (``optim.is_capturable``) steps outside its graph; ``outside`` names the roles for which that is
    so.  ``ValueError`` without a GPU, or for an objective that is not an ``IntervalObjective``.
    """

    def __init__(self, *args: Any, graph: Callable[[], Graph] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.objective, IntervalObjective):
            raise ValueError(
                f"only interval objectives can be captured; distill.objective is "
                f"{self.config.objective!r}: use Distiller"
            )
        if graph is None and self.backbone.device.type != "cuda":
            raise ValueError(
                f"capturing needs a backbone on an NVIDIA GPU; it is on {self.backbone.device}: "
                "use Distiller, or graph=RecordedGraph to test capture logic"
            )
        pools = [torch.cuda.graph_pool_handle() for _ in range(3)] if graph is None else [None] * 3
        # One pool per group of graphs whose memory may be shared: the activations of the student's
        # first graph must survive the ODE graphs, so those have their own.
        self._aux_graph, self._student_graph, self._ode_graph = (
            graph or partial(CudaGraph, (self.generator,), pool) for pool in pools
        )
        self.outside = [
            role for role in self.optimizers if not is_capturable(self.optimizers[role])
        ]
        self._steps: dict[Any, CapturedStep] = {}
        self._moving: Trajectories | None = None
        self._x_t: Tensor | None = None
        self._prepared: FixedRows | None = None

    def aux_step(self, cond: Any) -> dict[str, Tensor]:
        self._set_lr("aux")
        parts = self._parts(cond)
        run = self._captured("aux", self._aux_graph, self._aux_phase)
        losses = []
        for part in parts:
            with self.phase("aux/update"):
                loss, metrics = run(part, self._draw_aux_times(part))
            losses.append(loss.clone() if parts[1:] else loss)
        metrics = metrics or self._apply_after("aux", self._aux_graph)
        self.num_updates["aux"] += 1
        return metrics | {"aux_loss": torch.stack(losses).mean() if parts[1:] else loss}

    def _aux_phase(self, cond: Any, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._aux_backward(cond, t)
        return loss, self._apply("aux") if self._is_one_graph("aux") else {}

    def student_step(self, cond: Any) -> dict[str, Tensor]:
        self._set_lr("student")
        parts = []
        for part in self._parts(cond):
            metrics = self._student_phases(part)
            parts.append({name: value.clone() for name, value in metrics.items()})
        metrics = parts[0]
        if parts[1:]:
            metrics = {name: torch.stack([m[name] for m in parts]).mean() for name in metrics}
        if not self._is_one_graph("student"):
            metrics |= self._apply_after("student", self._student_graph)
        self.num_updates["student"] += 1
        return metrics

    def _student_phases(self, part: Any) -> dict[str, Tensor]:
        """Prepare, begin, as many ODE steps as the longest interval needs, finish."""
        table, step = self._draw_table(part), self._draw_backprop_step()
        self._load(table)
        begin = partial(self._begin, step=step)
        with self.phase("student/generate"):
            self._captured("prepare", self._student_graph, self._prepare)(part)
            self._captured(("begin", step), self._student_graph, begin)(part)
        with self.phase("student/integrate"):
            for n in table.active:
                ode_step = partial(self._ode_step, n)
                self._captured(("ode", n), self._ode_graph, ode_step, after="prepare")()
        with self.phase("student/finish"):
            return self._captured(("finish", step), self._student_graph, self._finish)()

    def _is_one_graph(self, role: str) -> bool:
        """Whether the optimizer's step is in the same graph as the backward pass."""
        return self.config.micro_batches == 1 and role not in self.outside

    def _apply_after(self, role: str, graph: Callable[[], Graph]) -> dict[str, Tensor]:
        """The optimizer's step when all micro-batches are done: its own graph, or no graph."""
        apply = partial(self._apply, role)
        return apply() if role in self.outside else self._captured(("apply", role), graph, apply)()

    def _load(self, table: SolverTable) -> None:
        """Copy the intervals of this update into the static tables."""
        if self._moving is None:
            self._allocate(table)
        evaluations, batch = table.times.shape
        if batch != self._span.shape[0]:
            raise ValueError(
                f"a captured step keeps its batch size, {self._span.shape[0]}; got {batch}"
            )
        table = table.to(self.backbone.device)
        self._times[:evaluations].copy_(table.times, non_blocking=True)
        self._coef[:evaluations].copy_(table.coef, non_blocking=True)
        self._span.copy_(table.span, non_blocking=True)

    def _allocate(self, table: SolverTable) -> None:
        config, device = self.config, self.backbone.device
        batch = table.span.shape[0]
        widest = 1.0 if config.max_interval is None else min(config.max_interval, 1.0)
        longest = plan(
            torch.tensor([1.0]),
            torch.tensor([1.0 - widest]),
            step_size=config.step_size,
            solver=config.solver,
            grid=config.grid or None,
        )
        # One more step for the rounding of the widest interval's ends to the grid.
        rows = len(longest.active) + EVALUATIONS_PER_STEP[config.solver]
        self._times = torch.zeros(rows, batch, device=device)
        self._coef = torch.zeros(rows, batch, 5, device=device)
        self._span = torch.ones(batch, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        shape = (batch, 2, *self.backbone.sample_shape)
        self._moving = Trajectories.like(
            torch.empty(shape, device=device),
            len(self.objective.lanes),
            self.backbone.dtype,
            has_history=config.solver != "euler",
        )

    @torch.no_grad()
    def _prepare(self, cond: Any) -> None:
        """What the ODE graphs read and none of them computes: the lanes' conditions, prepared."""
        self._prepared = FixedRows(
            self.backbone.prepare(cond), self.backbone.lane_groups(self.objective.lanes)
        )

    def _begin(self, cond: Any, *, step: int | None) -> None:
        """Generate with gradient, noise to t, put both trajectories at x_t."""
        _, x0, noise = self._student_samples(cond, step)
        self._x_t = self.objective.noised(x0, noise, self._times[0])
        with torch.no_grad():
            self._moving.start(self.objective.starts(self._x_t))
            self._row.zero_()

    @torch.no_grad()
    def _ode_step(self, n: int) -> None:
        """One solver step of the first n samples; the row of the table is counted on the device."""
        times = self._times.index_select(0, self._row)[0, :n]
        coef = self._coef.index_select(0, self._row)[0, :n]
        with evaluating(self.backbone):
            self._moving.step(
                lambda x, t: self.objective.velocity(self.backbone, self._prepared, x, t),
                n,
                times,
                coef,
                self.config.guidance,
            )
        self._row += 1

    def _finish(self) -> dict[str, Tensor]:
        loss, metrics = self.objective.loss(self._x_t, self._moving.x, self._times[0], self._span)
        metrics |= {"saturation": self._saturation}
        self._backward("student", loss, retain_graph=True)  # its activations are graph memory
        return metrics | (self._apply("student") if self._is_one_graph("student") else {})

    def _captured(
        self, key: Any, graph: Callable[[], Graph], function: Callable, after: Any = None
    ) -> CapturedStep:
        if key not in self._steps:
            self._steps[key] = CapturedStep(function, graph=graph, after=self._steps.get(after))
        return self._steps[key]
