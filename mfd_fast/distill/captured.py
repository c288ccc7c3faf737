"""The distillation step as CUDA graphs: nothing is launched from Python in steady state.

    auxiliary update    one graph: generate, noise, forward, backward, clip, optimizer, average
    student update      one graph: what is constant along the trajectories
                        one graph: generate with gradient, noise to t
                        one graph per number of samples still moving, replayed once per ODE step
                        one graph: loss, backward, clip, optimizer, average

The host only draws times, copies them down and decides which graph comes next; that is known
without asking the device, because (t, r) are host random numbers.  Every shape of the condition has
its own graphs, captured when it has come often enough; all of them share the memory of two pools.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mfd_fast.backbones.lanes import FixedRows, batch_size, in_parts
from mfd_fast.backbones.networks import evaluating
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.graphs import CapturedStep, CudaGraph
from mfd_fast.distill.objectives import OBJECTIVES
from mfd_fast.distill.optim import is_capturable
from mfd_fast.flow.integrate import Trajectories
from mfd_fast.flow.solvers import EVALUATIONS_PER_STEP, SolverTable, plan

MAX_SHAPES = 16  # of the condition that get graphs; updates of others run as they are


def why_eager(config: DistillConfig, device: str, *, is_sharded: bool = False) -> str:
    """Why the updates of ``config`` on ``device`` cannot be captured as CUDA graphs, or nothing."""
    if config.objective not in OBJECTIVES:
        return f"distill.objective={config.objective!r} cannot be captured"
    if is_sharded:
        return "train.shard fsdp gathers weights in every update"
    if device != "cuda":
        return f"capturing needs an NVIDIA GPU and this is {device}"
    return ""


@dataclass
class _Static:
    """The graphs of one shape of the condition, and the memory they work on.

    times ``[evaluations, B]``, coef ``[evaluations, B, 5]``, span ``[B]``: the intervals of an
    update; row: how many evaluations are done ``[1]``.  ``prepared``, ``x_t`` and ``saturation``
    are what a graph leaves to a later one of the same update, which reads it where it was at
    capture.
    """

    moving: Trajectories
    times: Tensor
    coef: Tensor
    span: Tensor
    row: Tensor
    prepared: FixedRows | None = None
    x_t: Tensor | None = None
    saturation: Tensor | None = None
    steps: dict[Any, CapturedStep] = field(default_factory=dict)


class CapturedDistiller(Distiller):
    """A :class:`Distiller` whose updates run as graphs after three warm-up updates.

    Args: those of ``Distiller``, and
        graph: the kind of graph; one that is no ``CudaGraph`` need not have a GPU.
        may_fall_back: run as ``Distiller`` does, with a warning, if the last warm-up update meets
            an operator that cannot be captured; otherwise that is a ``ValueError``.

    A condition of another shape or batch size gets its own graphs, up to ``MAX_SHAPES`` of them.
    An optimizer that cannot be captured (``optim.is_capturable``) steps outside its graph;
    ``outside`` names the roles for which that is so.  ``ValueError`` without a GPU, for weights
    that are sharded, or for an objective that is not an ``IntervalObjective``.
    """

    def __init__(
        self,
        *args: Any,
        graph: type[CudaGraph] = CudaGraph,
        may_fall_back: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        device = "cuda" if graph is not CudaGraph else self.backbone.device.type
        if why := why_eager(self.config, device, is_sharded=self.ranks.is_sharded):
            raise ValueError(f"{why}: use Distiller, or make_distiller, which does")
        self.graph_type, self.may_fall_back = graph, may_fall_back
        self.outside = [
            role for role in self.optimizers if not is_capturable(self.optimizers[role])
        ]
        self.refusal = ""
        self._static: dict[Any, _Static] = {}
        self._apply_steps: dict[str, CapturedStep] = {}
        self.release_graphs()

    def release_graphs(self) -> None:
        """Let all graphs and their memory go; updates warm up and capture again."""
        # The updates never run at the same time and share a pool.  What the student's first graphs
        # leave to the last must survive the ODE graphs, so those have their own.
        self._update_graph, self._ode_graph = (
            partial(self.graph_type, (self.generator,), self.graph_type.new_pool())
            for _ in range(2)
        )
        for static in self._static.values():
            static.steps.clear()  # whose functions know static
        self._static.clear()
        self._apply_steps.clear()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        steps = [step for static in self._static.values() for step in static.steps.values()]
        return sum(step.graph is not None for step in [*steps, *self._apply_steps.values()])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.release_graphs()  # they know the optimizers' tensors of before

    def aux_step(self, cond: Any) -> dict[str, Tensor]:
        cond, samples = self._aux_source(cond)
        static = self._static_of(cond)
        if static is None:
            return super().aux_step(cond)
        self.trained["aux"].set_lr()
        key = "aux" if samples[0] is None else "aux, kept samples"
        run = self._captured(static, key, self._update_graph, self._aux_phase)
        losses, generated = [], []
        for part, x0 in zip(in_parts(cond, self.config.micro_batches), samples, strict=True):
            with self.phase("aux/update"):
                kept = () if x0 is None else (x0,)
                loss, x0, metrics = run(part, self._draw_aux_times(part), *kept)
            losses.append(loss.clone())
            generated.append(x0 if x0 is None else x0.clone())
        self._aux_learned_from(generated, cond)
        metrics = metrics or self._apply_after("aux")
        self.trained["aux"].num_updates += 1
        loss = torch.stack(losses).mean() if losses[1:] else losses[0]
        return _kept(metrics) | {"aux_loss": loss}

    def _aux_phase(
        self, cond: Any, t: Tensor, x0: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The loss, the samples if they are to be kept, the metrics of the optimizer's step."""
        keeps = x0 is None and self.config.aux_samples != "new"
        loss, x0 = self._aux_backward(cond, t, x0)
        metrics = self._apply("aux") if self._is_one_graph("aux") else {}
        return loss, x0 if keeps else None, metrics

    def student_step(self, cond: Any) -> dict[str, Tensor]:
        static = self._static_of(cond)
        if static is None:
            return super().student_step(cond)
        self.trained["student"].set_lr()
        parts = in_parts(cond, self.config.micro_batches)
        done = [self._student_phases(static, part) for part in parts]
        parts, samples = zip(*done, strict=True)
        self._student_left(samples, cond)
        metrics = parts[0]
        if parts[1:]:
            metrics = {name: torch.stack([m[name] for m in parts]).mean() for name in metrics}
        if not self._is_one_graph("student"):
            metrics |= _kept(self._apply_after("student"))
        self.trained["student"].num_updates += 1
        return metrics

    def _student_phases(
        self, static: _Static, part: Any
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Prepare, begin, as many ODE steps as the longest interval needs, finish: the metrics, and
        the samples if they are to be kept; copies.
        """
        table, step = self._draw_table(part), self._draw_backprop_step()
        self._load(static, table)
        run = partial(self._captured, static)
        begin = partial(self._begin, static, step=step)
        with self.phase("student/generate"):
            run("prepare", self._update_graph, partial(self._prepare, static))(part)
            # Captured later than "begin", the prepared rows might lie where it overwrites them.
            x0 = run(("begin", step), self._update_graph, begin, after="prepare")(part)
            x0 = x0 if x0 is None else x0.clone()
        with self.phase("student/integrate"):
            for n in table.active:
                ode_step = partial(self._ode_step, static, n)
                run(("ode", n), self._ode_graph, ode_step, after="prepare")()
        with self.phase("student/finish"):
            finish = partial(self._finish, static)
            finished = run(("finish", step), self._update_graph, finish, after=("begin", step))()
        return _kept(finished), x0

    def _is_one_graph(self, role: str) -> bool:
        """Whether the optimizer's step is in the same graph as the backward pass."""
        return self.config.micro_batches == 1 and role not in self.outside

    def _apply_after(self, role: str) -> dict[str, Tensor]:
        """The optimizer's step when all micro-batches are done: its own graph, or no graph."""
        apply = partial(self._apply, role)
        if role in self.outside:
            return apply()
        if role not in self._apply_steps:
            self._apply_steps[role] = CapturedStep(apply, graph=self._update_graph)
        return self._run(self._apply_steps[role])()

    def _static_of(self, cond: Any) -> _Static | None:
        """The graphs of the condition's shape; None if this update is to run without."""
        if self.refusal:
            self.release_graphs()
            return None
        leaves, spec = tree_flatten(cond)
        shape = spec, tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        if shape not in self._static and len(self._static) < MAX_SHAPES:
            self._static[shape] = self._allocated(batch_size(cond) // self.config.micro_batches)
        return self._static.get(shape)

    def _load(self, static: _Static, table: SolverTable) -> None:
        """Copy the intervals of this update into the static tables."""
        evaluations = len(table.times)
        table = table.to(self.backbone.device)
        static.times[:evaluations].copy_(table.times, non_blocking=True)
        static.coef[:evaluations].copy_(table.coef, non_blocking=True)
        static.span.copy_(table.span, non_blocking=True)

    def _allocated(self, batch: int) -> _Static:
        config, device = self.config, self.backbone.device
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
        shape = (batch, 2, *self.backbone.sample_shape)
        moving = Trajectories.like(
            torch.empty(shape, device=device),
            len(self.objective.lanes),
            self.backbone.dtype,
            has_history=config.solver != "euler",
        )
        return _Static(
            moving,
            times=torch.zeros(rows, batch, device=device),
            coef=torch.zeros(rows, batch, 5, device=device),
            span=torch.ones(batch, device=device),
            row=torch.zeros(1, dtype=torch.int64, device=device),
        )

    @torch.no_grad()
    def _prepare(self, static: _Static, cond: Any) -> None:
        """What the ODE graphs read and none of them computes: the lanes' conditions, prepared."""
        static.prepared = FixedRows(
            self.backbone.prepare(cond), self.backbone.lane_groups(self.objective.lanes)
        )

    def _begin(self, static: _Static, cond: Any, *, step: int | None) -> Tensor | None:
        """Generate with gradient, noise to t, put both trajectories at x_t; the samples, if they
        are to be kept.
        """
        _, x0, noise = self._student_samples(cond, step)
        static.x_t = self.objective.noised(x0, noise, static.times[0])
        static.saturation = self._saturation(x0)
        with torch.no_grad():
            static.moving.start(self.objective.starts(static.x_t))
            static.row.zero_()
        return x0.detach() if self.config.aux_samples == "student" else None

    @torch.no_grad()
    def _ode_step(self, static: _Static, n: int) -> None:
        """One solver step of the first n samples; the row of the table is counted on the device."""
        times = static.times.index_select(0, static.row)[0, :n]
        coef = static.coef.index_select(0, static.row)[0, :n]
        with evaluating(self.backbone):
            static.moving.step(
                lambda x, t: self.objective.velocity(self.backbone, static.prepared, x, t),
                n,
                times,
                coef,
                self.config.guidance,
            )
        static.row += 1

    def _finish(self, static: _Static) -> dict[str, Tensor]:
        """Loss and backward.  Nobody holds the activations after it: they are alive once, and other
        graphs of the pool may use their memory.
        """
        x_t, static.x_t = static.x_t, None
        ends, t = static.moving.x, static.times[0]
        loss, metrics = self.objective.loss(x_t, ends, t, static.span)
        metrics |= {"saturation": static.saturation}
        self._backward("student", loss)
        return metrics | (self._apply("student") if self._is_one_graph("student") else {})

    def _captured(
        self,
        static: _Static,
        key: Any,
        graph: Callable[[], CudaGraph],
        function: Callable,
        after: Any = None,
    ) -> Callable[..., Any]:
        steps = static.steps
        if key not in steps:
            steps[key] = CapturedStep(function, graph=graph, after=steps.get(after))
        return self._run(steps[key])

    def _run(self, step: CapturedStep) -> Callable[..., Any]:
        """The step, which is heard if it finds out that it cannot be captured."""

        def run(*args: Any) -> Any:
            outputs = step(*args)
            if step.refusal and not self.refusal:
                self._refuse(step.refusal)
            return outputs

        return run

    def _refuse(self, why: str) -> None:
        if not self.may_fall_back:
            raise ValueError(f"{why}; set train.capture to auto or off")
        self.refusal = why
        warnings.warn(f"{why}: updates run without CUDA graphs", stacklevel=2)


def _kept(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no later update overwrites."""
    return {name: value.clone() for name, value in metrics.items()}
