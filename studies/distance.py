"""Mean-flow distance over training (paper D.6, Fig. 7): |u_T - u_A| on the digits."""

from pathlib import Path
from typing import Any

import torch
from torch import Generator

from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import make_distiller
from studies.digits_runs import digits_config, distil, every_update, student_lr
from studies.plots import BLUE, ORANGE, Figure, titled
from studies.verdict import Verdict

CLAIM = (
    "The distance between teacher and auxiliary rises quickly at first, then declines slowly and "
    "does not vanish"
)
RULE = "at w = 1 it starts below a tenth of its peak and ends below the peak and above 0"
UPDATES = 100
BATCH = 32
LR = 3e-4
GUIDANCE = (1.0, 2.0)
WINDOW = 10  # updates behind the numbers of the verdict


def run(seed: int, folder: Path) -> dict[str, Any]:
    curves = {}
    for guidance in GUIDANCE:
        config = every_update(
            digits_config(
                updates=UPDATES,
                batch_size=BATCH,
                guidance=guidance,
                seed=seed,
                student_optim=student_lr(LR),
            )
        )
        _, rows, _ = distil(config)
        curves[f"{guidance:g}"] = [untrained_distance(config), *(row["distance"] for row in rows)]
    return {"updates": UPDATES, "batch": BATCH, "lr": LR, "distance": curves}


def untrained_distance(config: RunConfig) -> float:
    """The distance before the first update of either role."""
    task = config.task()
    distiller = make_distiller(task.backbone(), config.distill)
    prepared = distiller.backbone.prepare(task.conditions()(0))
    generator = Generator().manual_seed(config.distill.seed)
    z, noise = torch.randn(2, prepared.batch, *distiller.backbone.sample_shape, generator=generator)
    with torch.no_grad():
        x0 = z - distiller.backbone.student(z, torch.ones(len(z)), prepared.cond)
    table = distiller.objective.draw(prepared.batch, generator)
    _, metrics = distiller.objective.student_loss(distiller.backbone, prepared, x0, noise, table)
    return metrics["distance"].item()


def summary(curve: list[float]) -> tuple[float, float, float]:
    """At the start, the largest and the last mean over ``WINDOW`` updates."""
    means = [sum(curve[i : i + WINDOW]) / WINDOW for i in range(1, len(curve) - WINDOW + 1)]
    return curve[0], max(means), means[-1]


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=1, title="Mean-flow distance over training, digits")
    axis = figure.axes[0]
    for (guidance, curve), colour in zip(figures["distance"].items(), (BLUE, ORANGE), strict=True):
        axis.plot(range(len(curve)), curve, color=colour, label=f"w = {guidance}")
    axis.legend(fontsize=8, frameon=False)
    titled(axis, "untrained, then every student update", "student updates", "|u_T - u_A|")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    ends = {w: summary(curve) for w, curve in figures["distance"].items()}
    start, peak, last = ends["1"]
    text = "; ".join(
        f"w = {w}: {a:.2f} untrained, {b:.2f} at its peak, {c:.2f} at the end"
        for w, (a, b, c) in ends.items()
    )
    return Verdict.of(start < 0.1 * peak and 0 < last < peak, f"mean-flow distance: {text}")
