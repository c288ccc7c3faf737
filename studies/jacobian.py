"""The omitted Jacobian (paper B.6, Fig. 3): exact gradient against the one with fixed guidance.

At the noised samples x_t of a student in training with the guided teacher, delta = u_T - u_A is the
gradient that MFD uses; the exact gradient of |delta|^2 / 2 in x_t goes back through both ODE
solves.  The paper shows differences of lengths without a scale, so the lengths are reported and
the directions decide.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import SolverTable
from mfd_fast.ops import interpolate
from mfd_fast.run.loop import train
from mfd_fast.run.maker import make_distiller
from studies.digits_runs import digits_config, student_lr
from studies.plots import BLUE, ORANGE, Figure, titled
from studies.verdict import Verdict

CLAIM = (
    "While the gradient magnitudes remain relatively consistent, the directions diverge: a broad "
    "distribution with many samples exhibiting low or even negative cosine (B.6, Fig. 3)"
)
RULE = (
    "at both stages the cosines reach from negative to positive: their 5th percentile is below 0, "
    "their 95th above"
)
STAGES = (15, 150)
BATCH = 64
NUM_BATCHES = 4
LR = 3e-4
SHOWN = 0.97  # share of the differences of lengths in the picture


def run(seed: int, folder: Path) -> dict[str, Any]:
    config = digits_config(
        updates=STAGES[-1], batch_size=BATCH, seed=seed, student_optim=student_lr(LR)
    )
    task = config.task()
    distiller = make_distiller(task.backbone(), config.distill)
    rows = []
    for stage in STAGES:
        train(distiller, task.conditions(), replace(config.train, updates=stage))
        generator = Generator().manual_seed(seed)
        parts = [gradients(distiller, generator) for _ in range(NUM_BATCHES)]
        exact, fixed = (torch.cat(group).flatten(1) for group in zip(*parts, strict=True))
        rows.append({"stage": stage, **comparison(exact, fixed)})
    return {"guidance": config.distill.guidance, "samples": BATCH * NUM_BATCHES, "rows": rows}


def comparison(exact: Tensor, fixed: Tensor) -> dict[str, Any]:
    """Lengths and directions of gradients ``[N, D]``, sample by sample."""
    lengths = exact.norm(dim=1), fixed.norm(dim=1)
    cosine = F.cosine_similarity(exact, fixed)
    quantiles = torch.quantile(cosine, torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {
        "length_difference": (lengths[0] - lengths[1]).tolist(),
        "mean_lengths": [length.mean().item() for length in lengths],
        "cosine": cosine.tolist(),
        "cosine_5_50_95": quantiles,
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
    objective, w = distiller.objective, distiller.config.guidance

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        """Of the guided teacher and of the auxiliary; the lanes are condition, null, auxiliary."""
        lanes = torch.stack((x[:, 0], x[:, 0], x[:, 1]), dim=1)
        v = objective.velocity(distiller.backbone, prepared, lanes, t)
        return torch.stack((torch.lerp(v[:, 1], v[:, 0], w), v[:, 2]), dim=1)

    ends = integrate(velocity, x_t[:, None].expand(-1, 2, *x_t.shape[1:]), table)
    return (ends[:, 1] - ends[:, 0]) / table.span.view(-1, *(1,) * (x_t.ndim - 1))


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=2, title="Exact gradient against fixed guidance, digits")
    left, right = figure.axes
    every = torch.tensor([row["length_difference"] for row in figures["rows"]]).flatten()
    low, high = torch.quantile(every, torch.tensor([0.0, SHOWN])).tolist()
    for row, colour in zip(figures["rows"], (BLUE, ORANGE), strict=True):
        shown = {"bins": 40, "color": colour, "alpha": 0.6, "label": f"{row['stage']} updates"}
        left.hist(row["length_difference"], range=(low, high), **shown)
        right.hist(row["cosine"], range=(-1, 1), **shown)
    left.legend(fontsize=8, frameon=False)
    titled(left, f"difference of lengths, lower {SHOWN:.0%}", "|exact| - |fixed|", "samples")
    titled(right, "direction", "cosine", "samples")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    holds, parts = True, []
    for row in figures["rows"]:
        low, median, high = row["cosine_5_50_95"]
        holds &= low < 0 < high
        exact, fixed = row["mean_lengths"]
        parts.append(
            f"after {row['stage']} updates cosine {low:.2f} to {high:.2f} (5 to 95 %), median "
            f"{median:.2f}, negative for {row['negative_share']:.0%}; mean length {exact:.2f} "
            f"exact, {fixed:.2f} fixed"
        )
    return Verdict.of(
        holds, f"{figures['samples']} samples, w = {figures['guidance']:g}: " + "; ".join(parts)
    )
