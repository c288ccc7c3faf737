"""Spread of the student's loss (paper Fig. 2 and D.5): many batches at two frozen stages.

The loss of a batch is its mean |u_T - u_A|_2, which goes to 0 as the student is done; the surrogate
whose gradient trains the student has no meaning of its own size.  mfd and vsd each train their own
student and auxiliary from the same start.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mfd_fast.distill.distiller import Distiller
from mfd_fast.run.loop import train
from mfd_fast.run.maker import make_distiller
from mfd_fast.run.task import Task
from studies.digits_runs import digits_config, every_update, student_lr
from studies.plots import BLUE, ORANGE, Figure, titled
from studies.verdict import Verdict

CLAIM = "MFD's per-batch losses are more concentrated than VSD's, early and late in training"
RULE = (
    "at both stages mfd has the smaller standard deviation, and the smaller one relative "
    "to its mean"
)
STAGES = (10, 60)
METHODS = ("mfd", "vsd")
NUM_BATCHES = 60
BATCH = 32
LR = 3e-4
FIRST_PROBE = 1_000_000  # condition numbers of the batches that only measure


def run(seed: int, folder: Path) -> dict[str, Any]:
    stages, curves = [], {}
    for method in METHODS:
        config = every_update(
            digits_config(
                updates=STAGES[-1],
                batch_size=BATCH,
                objective=method,
                seed=seed,
                student_optim=student_lr(LR),
            )
        )
        task = config.task()
        distiller = make_distiller(task.backbone(), config.distill)
        curve = []
        for stage in STAGES:
            loop = replace(config.train, updates=stage)
            curve += [row["distance"] for row in train(distiller, task.conditions(), loop)]
            losses = frozen_losses(distiller, task)
            mean, std = losses.mean().item(), losses.std().item()
            stages.append(
                {"method": method, "stage": stage, "mean": mean, "std": std,
                 "relative": std / mean, "losses": losses.tolist()}
            )  # fmt: skip
        curves[method] = curve
    return {"batch": BATCH, "lr": LR, "stages": stages, "curves": curves}


@torch.no_grad()
def frozen_losses(distiller: Distiller, task: Task) -> torch.Tensor:
    """The losses ``[NUM_BATCHES]`` of fresh batches, nothing being trained."""
    backbone, objective, next_cond = distiller.backbone, distiller.objective, task.conditions()
    generator = torch.Generator().manual_seed(FIRST_PROBE)
    losses = []
    for i in range(NUM_BATCHES):
        prepared = backbone.prepare(next_cond(FIRST_PROBE + i))
        z, noise = torch.randn(2, prepared.batch, *backbone.sample_shape, generator=generator)
        x0 = z - backbone.student(z, torch.ones(prepared.batch), prepared.cond)
        table = objective.draw(prepared.batch, generator)
        losses.append(objective.student_loss(backbone, prepared, x0, noise, table)[1]["distance"])
    return torch.stack(losses)


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=3, title="Per-batch losses of frozen networks, and the running loss")
    for axis, stage in zip(figure.axes, STAGES, strict=False):
        rows = [row for row in figures["stages"] if row["stage"] == stage]
        parts = axis.violinplot([row["losses"] for row in rows], showmeans=True)
        for body, colour in zip(parts["bodies"], (BLUE, ORANGE), strict=True):
            body.set_facecolor(colour)
        names = [f"{row['method']}, sd/mean {row['relative']:.3f}" for row in rows]
        axis.set_xticks(range(1, len(rows) + 1), names)
        titled(axis, f"after {stage} student updates", y="|u_T - u_A|")
    for (method, curve), colour in zip(figures["curves"].items(), (BLUE, ORANGE), strict=True):
        figure.axes[2].plot(range(1, len(curve) + 1), curve, color=colour, label=method)
    figure.axes[2].legend(fontsize=8, frameon=False)
    titled(figure.axes[2], "in training", "student updates")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    rows = {(row["method"], row["stage"]): row for row in figures["stages"]}
    holds = all(
        rows["mfd", stage][key] < rows["vsd", stage][key]
        for stage in STAGES
        for key in ("std", "relative")
    )
    text = "; ".join(
        f"{method} at {stage}: mean {row['mean']:.2f}, sd {row['std']:.3f}, ratio "
        f"{row['relative']:.3f}"
        for (method, stage), row in rows.items()
    )
    return Verdict.of(holds, f"loss of a batch of {BATCH}: {text}")
