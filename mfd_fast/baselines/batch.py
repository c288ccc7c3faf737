"""What the methods that MFD is compared with share: the view that one update has of its networks,
data and random numbers, and the interface they fill in.  ``distiller.py`` drives them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map

from mfd_fast.backbones.lanes import (
    AUX,
    CopiedBackbone,
    Prepared,
    guided_lanes,
    trajectory_lanes,
)
from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.objectives import Metrics, time_pairs, times
from mfd_fast.flow.integrate import generate, integrate
from mfd_fast.flow.solvers import plan, to_device
from mfd_fast.flow.times import on_grid, uniform_schedule

Features = Callable[[Tensor], Tensor]  # samples [B, *S] -> [B, D]


@dataclass(frozen=True)
class Fields:
    """The three networks under one condition, as velocity fields (x ``[B, *S]``, t ``[B]``)."""

    backbone: CopiedBackbone
    prepared: Prepared
    guidance: float

    def student(self, x: Tensor, t: Tensor, *end: Tensor) -> Tensor:
        """F(x, t), or F(x, t, s) of a student that takes a second time; with gradient."""
        rows = x.to(self.backbone.dtype)
        return self.backbone.velocity("student", rows, t, self.prepared.cond, *end).to(x.dtype)

    def aux(self, x: Tensor, t: Tensor) -> Tensor:
        """The auxiliary's velocity; with gradient."""
        return self.backbone.forward(x[:, None], t, self.prepared, (AUX,))[:, 0].to(x.dtype)

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided teacher's velocity; without gradient."""
        lanes = trajectory_lanes(self.guidance)[:-1]
        rows = x[:, None].expand(-1, len(lanes), *x.shape[1:])
        v = guided_lanes(self.backbone, rows, t, self.prepared, lanes, self.guidance).to(x.dtype)
        return v[:, 0] if len(lanes) == 1 else torch.lerp(v[:, 1], v[:, 0], self.guidance)

    @torch.no_grad()
    def teacher_end(self, x: Tensor, t: Tensor, r: Tensor, config: DistillConfig) -> Tensor:
        """Where the guided teacher's ODE takes x from t down to r (host times ``[B]``)."""
        table = plan(t, r, step_size=config.step_size, solver=config.solver).to(x.device)
        order = torch.arange(len(x), device=x.device) if table.order is None else table.order
        lanes = trajectory_lanes(self.guidance)[:-1]
        cond, null = (_rows_of(tree, order) for tree in (self.prepared.cond, self.prepared.null))
        prepared = Prepared(cond, null, len(x))
        end = integrate(
            lambda rows, time: guided_lanes(
                self.backbone, rows, time, prepared, lanes, self.guidance
            ),
            x[order][:, None],
            table,
            guidance=self.guidance,
            num_lanes=len(lanes),
            dtype=self.backbone.dtype,
        )[:, 0]
        return torch.empty_like(end).index_copy_(0, order, end)

    def teacher_samples(self, noise: Tensor, steps: int) -> Tensor:
        """The guided teacher's samples from ``noise`` in equal Euler steps; without gradient."""
        with torch.no_grad():
            return generate(self.teacher, noise, steps=steps)


def _rows_of(tree: Any, order: Tensor) -> Any:
    return tree_map(lambda leaf: None if leaf is None else leaf[order], tree)


@dataclass(frozen=True)
class Batch:
    """What one update may use.

    fields: the networks under the batch's condition.  data: samples of the data ``[B, *S]``, None
    for an objective that needs none.  noise(): fresh standard normal ``[B, *S]``.  host: generator
    of the times, on the CPU.  update: student updates done so far.  averaged(): inside this block
    the student holds its EMA weights, if an average is kept.
    """

    fields: Fields
    data: Tensor | None
    noise: Callable[[], Tensor]
    host: Generator
    update: int
    averaged: Callable[[], AbstractContextManager]
    size: int
    device: torch.device

    def times(self, config: DistillConfig) -> Tensor:
        """t ``[B]`` by the config's distribution, on the device."""
        return to_device(on_grid(times(self.size, config, self.host), config.grid), self.device)

    def time_pairs(
        self, config: DistillConfig, *, equal_fraction: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """t >= s, each ``[B]``, by the config's distribution, on the device."""
        pairs = time_pairs(self.size, config, self.host, equal_fraction)
        t, s = (to_device(on_grid(time, config.grid), self.device) for time in pairs)
        return t, s


class Needs:
    """What a method needs of a run; here: what mfd and vsd do."""

    roles: tuple[str, ...] = ("aux", "student")
    """What it trains, in the order of a cycle."""
    sampler = "flow"
    """How its student takes K steps (``sampling.few_step``)."""
    uses_data = False
    """Whether the condition of an update is a pair (samples of the data, condition)."""
    second_time = False
    """Whether its student takes the end of the step as a second time."""


class ComparedObjective(Needs):
    """An objective that sees a whole :class:`Batch`; most train the student alone, on data.

    A subclass says what it needs and overrides ``student_loss``; with an auxiliary also
    ``aux_loss``.
    """

    roles = ("student",)
    uses_data = True

    def __init__(self, config: ComparisonConfig):
        self.config = config
        self.schedule = uniform_schedule(config.student_steps)

    def bind(self, backbone: CopiedBackbone, features: tuple[Features, int] | None) -> None:
        """Called once, before the optimizers are made: build what the objective owns."""

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """What the objective owns beside the backbone's parameters of the role."""
        return []

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss ``[]`` whose gradient moves the student, and metrics, all on the device."""
        raise NotImplementedError(f"{type(self).__name__} must define student_loss")

    def aux_loss(self, batch: Batch, t: Tensor) -> Tensor:
        """Loss ``[]`` of the auxiliary and of what the objective owns; t ``[B * draws]``."""
        raise NotImplementedError(f"{type(self).__name__} names the role aux: it needs an aux_loss")

    @torch.no_grad()
    def after_update(self, role: str, backbone: CopiedBackbone, skipped: Tensor) -> None:
        """Called after every optimizer step of the role; skipped ``[]`` is 1.0 if it did nothing,
        and then nothing may change here.
        """


def column(t: Tensor, x: Tensor) -> Tensor:
    """t ``[B]`` in the dtype of x ``[B, *S]``, shaped to multiply it."""
    return t.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def along_flow(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    dx_dt: Tensor,
    end: Tensor,
    *,
    over: float,
) -> tuple[Tensor, Tensor]:
    """``field(x, t)`` and its total derivative ``d/dt field(x(t), t)`` for dx/dt = ``dx_dt``.

    Args:
        end: the second time of ``field``, ``[B]``; it is not asked for below it.
        over: the derivative is the difference quotient over this much time around t, cut at
            ``end`` and at 1, for two more evaluations.  A network that was trained as v(x, t) sees
            t through sinusoids of up to 1000 t: its derivative in t is mostly that of the sinusoids
            between the times it was fit at, while a quotient over some periods is the field's.
            0: the derivative itself by one forward-mode pass, for networks that are smooth in t;
            attention falls back to the math kernel, the only one with such a rule.
    """
    if over == 0:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(field, (x, t), (dx_dt, torch.ones_like(t)))
    later, earlier = (t + over / 2).clamp_max(1.0), torch.maximum(t - over / 2, end)
    sides = [field(x + column(at - t, x) * dx_dt, at) for at in (later, earlier)]
    span = (later - earlier).clamp_min(torch.finfo(t.dtype).eps)  # t = end = 1: both are alike
    return field(x, t), (sides[0] - sides[1]) / column(span, x)
