"""The three roles on a pipeline's own network, and the guided teacher's samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.lanes import Backbone, guided_lanes, trajectory_lanes
from mfd_fast.backbones.networks import Patterns
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import scheduled
from mfd_fast.flow.times import Schedule
from mfd_fast.models.diffusers.family import Family, FamilyNetwork


def backbone_of(
    family: Family,
    *,
    rank: int = 64,
    alpha: float | None = None,
    targets: Patterns | None = None,
    activation: str = "none",
    compiler: str | Callable | None = None,
    generator: Generator | None = None,
) -> SharedBackbone:
    """Teacher, auxiliary and student as adapters of the pipeline's network, which is frozen.

    Args: those of ``AdapterBank`` and ``SharedBackbone``; alpha is the rank and targets are the
    family's if None.  ``ValueError`` for an activation policy that its blocks do not allow, or for
    blocks that cannot be compiled.
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
    network = FamilyNetwork(family)
    bank = AdapterBank(
        network,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        targets=family.targets if targets is None else targets,
        generator=generator,
    )
    backbone = SharedBackbone(
        network,
        adapters=bank,
        sample_shape=family.sample_shape,
        null_cond=family.null if family.has_null else None,
        dtype=family.pipe.transformer.dtype,
        activation=activation,
        blocks=family.blocks,
        compiler=compiler,
    )
    family.set_modes(family.pipe.transformer)
    return backbone


@torch.no_grad()
def teacher_samples(
    backbone: Backbone, cond: Any, noise: Tensor, schedule: Schedule, guidance: float
) -> Tensor:
    """Samples ``[B, *S]`` of the guided teacher by Euler steps on the schedule's nodes."""
    lanes = trajectory_lanes(guidance)[:-1]
    prepared = backbone.prepare(cond)
    end = integrate(
        lambda x, t: guided_lanes(backbone, x, t, prepared, lanes, guidance),
        noise[:, None],
        scheduled(schedule, len(noise)),
        guidance=guidance,
        num_lanes=len(lanes),
        dtype=backbone.dtype,
    )
    return end[:, 0]
