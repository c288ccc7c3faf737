"""The omitted Jacobian (paper B.6, Fig. 3): exact gradient against the one with fixed guidance.

At the noised samples x_t of a student in training, delta = u_T - u_A is the gradient that MFD
uses; the exact gradient of |delta|^2 / 2 in x_t goes back through both ODE solves.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import SolverTable
from mfd_fast.ops import interpolate
from studies.digits_runs import digits_config, distil, student_lr
from studies.plots import BLUE, Figure, titled
from studies.verdict import Verdict

CLAIM = (
    "Lengths of the exact and of the fixed-guidance gradient stay close; their directions differ, "
    "many with low or negative cosine"
)
RULE = (
    "the median relative difference of lengths is below a quarter, and a quarter of the cosines or "
    "more are below 0.5"
)
UPDATES = 20
BATCH = 64
NUM_BATCHES = 4
LR = 3e-4
LOW_COSINE = 0.5
CLOSE = 0.25  # relative difference of lengths


def run(seed: int, folder: Path) -> dict[str, Any]:
    config = digits_config(
        updates=UPDATES, batch_size=BATCH, guidance=1.0, seed=seed, student_optim=student_lr(LR)
    )
    distiller, _, _ = distil(config)
    generator = Generator().manual_seed(seed)
    parts = [gradients(distiller, generator) for _ in range(NUM_BATCHES)]
    exact, fixed = (torch.cat(group).flatten(1) for group in zip(*parts, strict=True))
    lengths = exact.norm(dim=1), fixed.norm(dim=1)
    relative = (lengths[0] - lengths[1]).abs() / lengths[1]
    cosine = F.cosine_similarity(exact, fixed)
    return {
        "updates": UPDATES,
        "samples": len(cosine),
        "length_difference": (lengths[0] - lengths[1]).tolist(),
        "relative_length_difference_median": relative.median().item(),
        "cosine": cosine.tolist(),
        "cosine_median": cosine.median().item(),
        "low_share": (cosine < LOW_COSINE).float().mean().item(),
        "negative_share": (cosine < 0).float().mean().item(),
    }


def gradients(distiller: Distiller, generator: Generator) -> tuple[Tensor, Tensor]:
    """Exact and fixed-guidance gradient in x_t, ``[B, *S]`` each, of every sample alone."""
    backbone = distiller.backbone
    labels = torch.randint(10, (BATCH,), generator=generator)
    prepared = backbone.prepare(labels)
    z, noise = torch.randn(2, BATCH, *backbone.sample_shape, generator=generator)
    with torch.no_grad():
        x0 = z - backbone.student(z, torch.ones(BATCH), labels)
    table = distiller.objective.draw(BATCH, generator)
    x_t = interpolate(x0, noise, table.times[0]).requires_grad_(True)
    delta = mean_flow_difference(distiller, prepared, x_t, table)
    (exact,) = torch.autograd.grad(delta.square().sum() / 2, x_t)
    return exact, delta.detach()


def mean_flow_difference(distiller: Distiller, prepared, x_t: Tensor, table: SolverTable) -> Tensor:
    """u_T - u_A ``[B, *S]``, differentiable in x_t through both solves."""
    ends = integrate(
        lambda x, t: distiller.objective.velocity(distiller.backbone, prepared, x, t),
        x_t[:, None].expand(-1, 2, *x_t.shape[1:]),
        table,
    )
    return (ends[:, 1] - ends[:, 0]) / table.span.view(-1, *(1,) * (x_t.ndim - 1))


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=2, title="Exact gradient against fixed guidance, digits")
    left, right = figure.axes
    left.hist(figures["length_difference"], bins=40, color=BLUE)
    titled(left, "difference of lengths", "|exact| - |fixed|", "samples")
    right.hist(figures["cosine"], bins=40, range=(-1, 1), color=BLUE)
    titled(right, "direction", "cosine", "samples")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    relative, low = figures["relative_length_difference_median"], figures["low_share"]
    return Verdict.of(
        relative < CLOSE and low > 0.25,
        f"median relative difference of lengths {relative:.2f}; median cosine "
        f"{figures['cosine_median']:.2f}, below {LOW_COSINE} for {low:.0%}, negative for "
        f"{figures['negative_share']:.0%} of {figures['samples']} samples",
    )
