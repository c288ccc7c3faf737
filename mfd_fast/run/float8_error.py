"""What e4m3 changes in the velocities of a run."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map

from mfd_fast.backbones.lanes import batch_size
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import plan


@contextmanager
def without_float8(backbone: SharedBackbone) -> Iterator[None]:
    """Inside the block the backbone is evaluated in its own dtype."""
    products, backbone.float8 = backbone.float8, None
    try:
        yield
    finally:
        backbone.float8 = products


@torch.no_grad()
def velocity_error(distiller: Distiller, cond: Any, *, r: float = 0.0) -> dict[str, float]:
    """``|u8 - u| / |u|`` of the mean velocities from noise (t = 1) to r, over all samples of cond.

    u is integrated in the network's dtype and u8 in e4m3, from the same noise, with the solver and
    steps of the run: of the guided ``teacher`` and of the ``auxiliary`` as they are now.  Draws
    nothing from the distiller's generators.  Waits for the device.

    ``ValueError`` if float8 is off, or no product of the network is large enough for it.
    """
    backbone, config, objective = distiller.backbone, distiller.config, distiller.objective
    products = getattr(backbone, "float8", None)
    if products is None:
        raise ValueError("float8 is off: call use_float8(backbone) first")
    prepared = backbone.prepare(cond)
    interval = torch.ones(prepared.batch), torch.full((prepared.batch,), r)
    table = plan(
        *interval, step_size=config.step_size, solver=config.solver, grid=config.grid or None
    ).to(backbone.device)
    generator = Generator().manual_seed(config.seed)
    noise = torch.randn(prepared.batch, *backbone.sample_shape, generator=generator)
    starts = objective.starts(noise.to(backbone.device))

    def displacement() -> Tensor:
        ends = integrate(
            lambda x, t: objective.velocity(backbone, prepared, x, t),
            starts,
            table,
            guidance=config.guidance,
            num_lanes=len(objective.lanes),
            dtype=backbone.dtype,
        )
        return starts - ends  # (t - r) u

    rounded = displacement()
    if not products.copies:
        raise ValueError(
            "float8 changes nothing here: no product has "
            f"{products.min_side} rows and terms and {products.min_outputs} outputs; turn it off: "
            "--train.no-float8"
        )
    with without_float8(backbone):
        exact = displacement()
    difference = (rounded - exact).transpose(0, 1).flatten(1).norm(dim=1)
    errors = difference / exact.transpose(0, 1).flatten(1).norm(dim=1)
    return dict(zip(("teacher", "auxiliary"), errors.tolist(), strict=True))


def float8_summary(distiller: Distiller, cond: Any) -> str:
    """:func:`velocity_error` of the first solver step in words, of the samples of cond that a step
    evaluates at once: two evaluations of the network, not two trajectories.
    """
    parts = distiller.ranks.world * distiller.config.micro_batches
    size = max(1, batch_size(cond) // parts)
    step = max(distiller.config.step_size, 1 / (distiller.config.grid or math.inf))
    rows = tree_map(lambda leaf: leaf[:size], cond)
    errors = velocity_error(distiller, rows, r=max(0.0, 1.0 - step))
    copies = distiller.backbone.float8.copies.values()
    size = sum(math.prod(copy.values.shape) + 4 * len(copy.scale) for copy in copies)
    listed = ", ".join(f"{role} {error:.2%}" for role, error in errors.items())
    return (
        f"{len(copies)} weights in e4m3, {size / 1e6:.3g} MB; error of the velocity at the "
        f"noise, the first step: {listed}"
    )
