"""The three roles on a pipeline's own network, and the guided teacher's samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.lanes import (
    Backbone,
    Lane,
    Prepared,
    check_lanes,
    guided_lanes,
    trajectory_lanes,
)
from mfd_fast.backbones.networks import Patterns
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import scheduled
from mfd_fast.flow.times import Schedule
from mfd_fast.models.diffusers.family import Family
from mfd_fast.models.diffusers.lengths import OwnLengths, Rows, by_length
from mfd_fast.models.diffusers.network import FamilyNetwork
from mfd_fast.models.diffusers.rotary import fuse_rotary


def backbone_of(
    family: Family,
    *,
    rank: int = 64,
    alpha: float | None = None,
    targets: Patterns | None = None,
    activation: str = "none",
    compiler: str | Callable | None = None,
    generator: Generator | None = None,
    prepares: bool = True,
) -> SharedBackbone:
    """Teacher, auxiliary and student as adapters of the pipeline's network, which is frozen.

    Args: those of ``AdapterBank``, ``SharedBackbone`` and ``FamilyNetwork``; alpha is the rank and
    targets are the family's if None.  ``ValueError`` for an activation policy that its blocks do
    not allow, or for blocks that cannot be compiled.
    """
    if activation not in family.activations:
        raise ValueError(
            f"train.activation must be {' or '.join(family.activations)} for "
            f"{type(family.pipe).__name__}, got {activation!r}"
        )
    if compiler is not None and family.why_uncompiled:
        raise ValueError(
            f"pipeline.compile must be off for {type(family.pipe).__name__}: "
            f"{family.why_uncompiled}"
        )
    network = FamilyNetwork(family, prepares=prepares)
    bank = AdapterBank(
        network,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        targets=family.targets if targets is None else targets,
        generator=generator,
    )
    backbone = _kind(family)(
        network,
        adapters=bank,
        sample_shape=family.sample_shape,
        null_cond=family.null if family.has_null else None,
        dtype=family.pipe.transformer.dtype,
        activation=activation,
        blocks=family.blocks,
        compiler=compiler,
    )
    for part in family.networks.values():
        family.set_modes(part)
        fuse_rotary(part)
    return backbone


def _kind(family: Family) -> type[SharedBackbone]:
    """By how a family calls its networks."""
    if isinstance(family, OwnLengths):
        return LengthsBackbone
    if family.one_length:
        return OneLengthBackbone
    return SharedBackbone if len(family.networks) == 1 else ExpertsBackbone


class ExpertsBackbone(SharedBackbone):
    """Two networks that take turns by time, as adapters of one bank: every lane is evaluated by the
    network of its time.

    A step that crosses the boundary takes the velocity at its start, as the pipeline's own.
    """

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        n = check_lanes(x, prepared, lanes)
        times = t if t.ndim == 2 else t[:, None].expand(n, len(lanes))
        is_first, v = self.network.family.is_first(times), None
        for name, mine in zip(self.network.family.networks, (is_first, ~is_first), strict=True):
            if mine.all():
                return self._of(name, x, times, prepared, lanes)
            samples = mine.any(dim=1).nonzero().flatten().to(x.device)
            if len(samples):
                part = Part(prepared, samples)
                made = self._of(name, x[samples], times[samples], part, lanes)
                is_mine = mine.to(x.device)[samples].view(*made.shape[:2], *(1,) * (x.ndim - 2))
                v = made.new_zeros(x.shape) if v is None else v
                v = v.index_add(0, samples, torch.where(is_mine, made, 0.0))
        return v

    def _of(self, name: str, x: Tensor, t: Tensor, prepared: Any, lanes: tuple[Lane, ...]):
        """Velocities of one of the networks; the other's targets are not missed."""
        for index, target in enumerate(self.adapters.targets):
            if not target.name.startswith(f"{name}."):
                self.adapters.mark_called(index)
        self.network.only = name
        try:
            return super().forward(x, t, prepared, lanes)
        finally:
            self.network.only = ""


class LengthsBackbone(SharedBackbone):
    """The three roles on the network of :class:`OwnLengths`: one call where all lanes have a text
    of one length, else one for each length with a condition and one without.
    """

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        n, together = check_lanes(x, prepared, lanes), super().forward
        times = t if t.ndim == 2 else t[:, None].expand(n, len(lanes))
        kinds = {lane.is_conditional: [] for lane in lanes}
        for column, lane in enumerate(lanes):
            kinds[lane.is_conditional].append(column)
        lengths = {kind: (prepared.cond if kind else prepared.null)["length"][:n] for kind in kinds}
        if len(torch.cat([*lengths.values()]).unique()) == 1:
            return together(x, t, prepared, lanes)
        made: dict[int, Tensor] = {}
        for kind, columns in kinds.items():

            def evaluate(rows: Rows, columns: list[int] = columns) -> Tensor:
                parts = (torch.stack([y[rows, i] for i in columns], dim=1) for y in (x, times))
                part = prepared if isinstance(rows, slice) else Part(prepared, rows)
                return together(*parts, part, tuple(lanes[i] for i in columns))

            v = by_length(lengths[kind], evaluate)
            made |= dict(zip(columns, v.unbind(1), strict=True))
        return torch.stack([made[column] for column in range(len(lanes))], dim=1)


class OneLengthBackbone(SharedBackbone):
    """A network that takes prompts of one length: samples of several, a call for each length."""

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        first = prepared.cond["first"][: check_lanes(x, prepared, lanes)]
        v = None
        for length in (lengths := first.unique().tolist()):
            if len(lengths) == 1:
                return super().forward(x, t, prepared, lanes)
            samples = (first == length).nonzero().flatten().to(x.device)
            made = super().forward(x[samples], t[samples], Part(prepared, samples), lanes)
            v = made.new_zeros(x.shape) if v is None else v
            v = v.index_copy(0, samples, made)
        return v


class Part(NamedTuple):
    """Some samples of a prepared batch, as ``Prepared``."""

    prepared: Prepared
    samples: Tensor

    @property
    def batch(self) -> int:
        return len(self.samples)

    def rows(self, lanes: tuple[Lane, ...], n: int) -> Any:
        """Conditions ``[n * L, ...]`` of the first n of them."""
        return tree_map(
            lambda leaf: leaf.unflatten(0, (-1, len(lanes)))[
                self.samples[:n].to(leaf.device)
            ].flatten(0, 1),
            self.prepared.rows(lanes, self.prepared.batch),
        )


@torch.no_grad()
def teacher_samples(
    backbone: Backbone, cond: Any, noise: Tensor, schedule: Schedule, guidance: float
) -> Tensor:
    """Samples ``[B, *S]`` of the guided teacher by Euler steps on the schedule's nodes.

    Where these end above t = 0 the state x_t / (1 - t) is taken for the data.
    """
    lanes = trajectory_lanes(guidance)[:-1]
    prepared = backbone.prepare(cond)
    end = integrate(
        lambda x, t: guided_lanes(backbone, x, t, prepared, lanes, guidance),
        schedule.begin(noise)[:, None],
        scheduled(schedule, len(noise)),
        guidance=guidance,
        num_lanes=len(lanes),
        dtype=backbone.dtype,
    )
    return end[:, 0] / (1.0 - schedule.nodes[-1])
