"""No auxiliary (paper C.4): the conditional velocity eps - x_0 in its place collapses the student.

One teacher step ends near the mean of the data whatever the noise, so a student that starts as the
teacher starts collapsed.  Here MFD with the auxiliary first makes a student that spreads as the
teacher does; then it goes on from there without, and, as a control, with the auxiliary.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import generate, mean_velocity
from mfd_fast.flow.times import sample_time_pairs
from mfd_fast.ops import interpolate, mfd_loss
from studies.plots import BLUE, ORANGE, Figure, titled
from studies.toy_runs import distil_toy, teacher_samples, toy_config, toy_teacher
from studies.toys import TOYS
from studies.verdict import Verdict

CLAIM = (
    "Without the auxiliary the training leads to rapid collapse within the first 500 iterations; "
    "the student's distribution collapses to a point mass (C.4)"
)
RULE = (
    "on every toy and with every seed the variance of the samples after 500 updates without the "
    "auxiliary is below that after 100, and that below the control's after 500"
)
UPDATES_WITH = 150
UPDATES = 500
EVERY = 20
BATCH = 256
NUM_SEEDS = 3
MEASURED = 2000


def run(seed: int, folder: Path, updates: int = UPDATES) -> dict[str, Any]:
    rows = []
    for toy in TOYS:
        reference = total_variance(teacher_samples(toy, MEASURED, seed=2))
        for s in range(seed, seed + NUM_SEEDS):
            distiller, _ = distil_toy(toy, toy_config(seed=s), updates=UPDATES_WITH)
            student = copy.deepcopy(distiller.backbone.student)
            without = collapse(toy_teacher(toy), student, s, updates)
            control = going_on(distiller, updates)
            rows += [
                {"toy": toy, "seed": s, "auxiliary": name,
                 "variance_share": [variance / reference for variance in variances]}
                for name, variances in (("without", without), ("with", control))
            ]  # fmt: skip
    return {"updates": list(range(0, updates + 1, EVERY)), "rows": rows}


def collapse(
    teacher: nn.Module, student: nn.Module, seed: int, updates: int, lr: float | None = None
) -> list[float]:
    """Total variance of the student's samples every ``EVERY`` updates, v_A = eps - x_0.

    Everything else, also the learning rate (if None), is that of :func:`going_on`.
    """
    config = toy_config()
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr or config.student_optim.lr)
    variances = []
    for update in range(updates + 1):
        if update % EVERY == 0:
            variances.append(variance_of(student))
        x0 = one_step(student, torch.randn(BATCH, 2, generator=generator))
        noise = torch.randn(BATCH, 2, generator=generator)
        t, r = sample_time_pairs(BATCH, generator=generator)
        x_t = interpolate(x0, noise, t)
        u_teacher = mean_velocity(
            lambda x, t: teacher(x, t, t), x_t.detach(), t, r, step_size=config.step_size
        )
        optimizer.zero_grad()
        mfd_loss(x_t, u_teacher, (noise - x0).detach()).backward()
        optimizer.step()
    return variances


def going_on(distiller: Distiller, updates: int) -> list[float]:
    """The same for ``updates`` more of MFD as it is, with the auxiliary: the control."""
    cond, variances = torch.empty(BATCH, 0), []
    for update in range(updates + 1):
        if update % EVERY == 0:
            variances.append(variance_of(distiller.backbone.student))
        for _ in range(distiller.cycle_length):
            distiller.step(cond)
    return variances


@torch.no_grad()
def variance_of(student: nn.Module) -> float:
    """Total variance of the student's samples from always the same noise."""
    noise = torch.randn(MEASURED, 2, generator=Generator().manual_seed(1))
    return total_variance(one_step(student, noise))


def one_step(student: nn.Module, noise: Tensor) -> Tensor:
    """Samples ``[B, 2]`` of a student of one step."""
    return generate(lambda x, t: student(x, t, t), noise)


def total_variance(samples: Tensor) -> float:
    """Trace of the covariance of ``[N, D]``."""
    return samples.var(dim=0).sum().item()


def draw(figures: dict[str, Any], path: Path) -> None:
    toys = list(dict.fromkeys(row["toy"] for row in figures["rows"]))
    figure = Figure(
        columns=len(toys), title="Spread of the samples, with the auxiliary and without"
    )
    lowest = min(min(row["variance_share"]) for row in figures["rows"])
    for axis, toy in zip(figure.axes, toys, strict=True):
        for row in figures["rows"]:
            if row["toy"] == toy:
                label = row["auxiliary"] if row["seed"] == figures["rows"][0]["seed"] else None
                colour = BLUE if row["auxiliary"] == "with" else ORANGE
                axis.semilogy(figures["updates"], row["variance_share"], color=colour, label=label)
        axis.set_ylim(lowest / 1.5, 3)
        axis.legend(fontsize=8, frameon=False)
        titled(axis, toy.replace("_", " "), "student updates", "variance / teacher's variance")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    at = {update: i for i, update in enumerate(figures["updates"])}
    share = {(r["toy"], r["seed"], r["auxiliary"]): r["variance_share"] for r in figures["rows"]}
    holds, parts = True, {}
    for (toy, seed, name), without in share.items():
        if name == "without":
            control = share[toy, seed, "with"]
            holds &= without[at[UPDATES]] < without[at[100]] < control[at[UPDATES]]
            parts.setdefault(toy, []).append((without[at[UPDATES]], control[at[UPDATES]]))
    text = "; ".join(
        f"{toy.replace('_', ' ')} " + ", ".join(f"{a:.4f} against {b:.2f}" for a, b in pairs)
        for toy, pairs in parts.items()
    )
    return Verdict.of(
        holds,
        f"variance of the samples after {UPDATES} updates as a share of the teacher's, without the "
        f"auxiliary against the control, each seed: {text}",
    )
