"""Spread of the student's loss (paper Fig. 2 and D.5) at two frozen stages, sample by sample.

The loss is the paper's surrogate, Eq. 19: the mean over a sample's numbers of (u_T - u_A) x_t with
the gradient stopped at u_T - u_A, at batch 1 as in the official runs.  mfd and vsd each train their
own student and auxiliary from the same start.  Beside it, not decided on: the signal of the
gradient u_T - u_A, which is its mean over samples at one x_t's condition, over its noise.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mfd_fast.distill.distiller import Distiller
from mfd_fast.ops import interpolate
from mfd_fast.run.loop import train
from mfd_fast.run.maker import make_distiller
from mfd_fast.run.task import Task
from studies.digits_runs import digits_config, mean_and_spread, student_lr
from studies.plots import BLUE, ORANGE, Figure, titled
from studies.verdict import Verdict

CLAIM = (
    "At both early and late training stages, MFD exhibits consistently narrower and more "
    "concentrated loss distributions (5.4, Fig. 2; the loss is Eq. 19)"
)
RULE = (
    "at both stages mfd's losses have a smaller standard deviation than vsd's, with every one of "
    "the seeds"
)
STAGES = (15, 80)
METHODS = ("mfd", "vsd")
NUM_SEEDS = 3
BATCH = 32
LOSSES = 640  # samples of a stage
LR = 3e-4
FIRST_PROBE = 1_000_000  # condition numbers of the samples that only measure


def run(seed: int, folder: Path) -> dict[str, Any]:
    rows = [
        {"method": method, "seed": s, **stage}
        for s in range(seed, seed + NUM_SEEDS)
        for method in METHODS
        for stage in stages_of(method, s)
    ]
    return {"losses": LOSSES, "lr": LR, "rows": rows}


def stages_of(method: str, seed: int) -> list[dict[str, Any]]:
    """Train to each of ``STAGES`` and measure there."""
    config = digits_config(
        updates=STAGES[-1],
        batch_size=BATCH,
        objective=method,
        seed=seed,
        student_optim=student_lr(LR),
    )
    task = config.task()
    distiller = make_distiller(task.backbone(), config.distill)
    rows = []
    for stage in STAGES:
        train(distiller, task.conditions(), replace(config.train, updates=stage))
        losses, noise_over_signal = frozen_losses(distiller, task)
        mean, std = mean_and_spread(losses)
        rows.append(
            {"stage": stage, "mean": mean, "std": std, "losses": losses,
             "noise_over_signal": noise_over_signal}
        )  # fmt: skip
    return rows


@torch.no_grad()
def frozen_losses(distiller: Distiller, task: Task) -> tuple[list[float], float]:
    """Eq. 19 of ``LOSSES`` fresh samples, nothing being trained; noise over signal of their
    gradients: |standard deviation| / |mean| of u_T - u_A over the samples.
    """
    backbone, objective, next_cond = distiller.backbone, distiller.objective, task.conditions()
    generator = torch.Generator().manual_seed(FIRST_PROBE)
    losses, gradients = [], []
    for i in range(LOSSES // BATCH):
        prepared = backbone.prepare(next_cond(FIRST_PROBE + i))
        z, noise = torch.randn(2, prepared.batch, *backbone.sample_shape, generator=generator)
        x0 = z - backbone.student(z, torch.ones(prepared.batch), prepared.cond)
        table = objective.draw(prepared.batch, generator)
        with torch.enable_grad():
            leaf = x0.requires_grad_(True)
            loss, _ = objective.student_loss(backbone, prepared, leaf, noise, table)
            (gradient,) = torch.autograd.grad(loss, leaf)
        # d loss / d x_t = (u_T - u_A) / (numbers of the batch), and x_t = (1 - t) x_0 + t noise.
        t = table.times[0]
        share = (1 - t).view(-1, *(1,) * (x0.ndim - 1))
        difference = gradient * gradient.numel() / share
        x_t = interpolate(x0.detach(), noise, t)
        losses += (difference * x_t).flatten(1).mean(1).tolist()
        gradients.append(difference.flatten(1))
    every = torch.cat(gradients)
    return losses, (every.std(0).norm() / every.mean(0).norm()).item()


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=2, title="Losses of single samples, frozen networks (Eq. 19)")
    for axis, stage in zip(figure.axes, STAGES, strict=True):
        groups = [of(figures, method, stage) for method in METHODS]
        losses = [[loss for row in group for loss in row["losses"]] for group in groups]
        for part, colour in zip(
            axis.violinplot(losses, showmeans=True)["bodies"], (BLUE, ORANGE), strict=True
        ):
            part.set_facecolor(colour)
        names = [f"{m}, sd {mean_sd(g)[0]:.3f}" for m, g in zip(METHODS, groups, strict=True)]
        axis.set_xticks(range(1, len(names) + 1), names)
        titled(axis, f"after {stage} student updates, {NUM_SEEDS} seeds", y="loss of a sample")
    low = min(axis.get_ylim()[0] for axis in figure.axes)
    high = max(axis.get_ylim()[1] for axis in figure.axes)
    for axis in figure.axes:
        axis.set_ylim(low, high)
    figure.save(path)


def of(figures: dict[str, Any], method: str, stage: int) -> list[dict[str, Any]]:
    """The rows of all seeds."""
    return [row for row in figures["rows"] if (row["method"], row["stage"]) == (method, stage)]


def mean_sd(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean and spread over seeds of the losses' standard deviation."""
    return mean_and_spread([row["std"] for row in rows])


def judge(figures: dict[str, Any]) -> Verdict:
    holds, parts = True, []
    for stage in STAGES:
        mfd, vsd = (of(figures, method, stage) for method in METHODS)
        holds &= all(a["std"] < b["std"] for a, b in zip(mfd, vsd, strict=True))
        for name, rows in (("mfd", mfd), ("vsd", vsd)):
            ratio, _ = mean_and_spread([row["noise_over_signal"] for row in rows])
            sd, spread = mean_sd(rows)
            parts.append(f"{name} at {stage}: sd {sd:.4f} ({spread:.4f}), noise/signal {ratio:.1f}")
    return Verdict.of(holds, f"losses of {figures['losses']} samples a seed: " + "; ".join(parts))
