"""No auxiliary (paper C.4): the conditional velocity eps - x_0 in its place collapses the student.

One teacher step ends near the mean of the data whatever the noise, so a student that starts as the
teacher starts collapsed.  Here MFD with the auxiliary first makes a student that spreads as the
teacher does; then it goes on from there without, the learning rate falling to 0.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mfd_fast.flow.integrate import generate, mean_velocity
from mfd_fast.flow.times import sample_time_pairs
from mfd_fast.ops import interpolate, mfd_loss
from studies.plots import COLOURS, GREY, Figure, titled
from studies.toy_runs import distil_toy, teacher_samples, toy_config, toy_teacher
from studies.toys import TOYS
from studies.verdict import Verdict

CLAIM = "Without the auxiliary the student collapses to a point within 500 updates"
RULE = "on every toy the variance ends below 1 % of the teacher's"
UPDATES_WITH = 150
UPDATES = 800
EVERY = 20
BATCH = 256
LR = 3e-3
STEP_SIZE = 0.1
MEASURED = 2000


def run(seed: int, folder: Path, updates: int = UPDATES) -> dict[str, Any]:
    shares = {}
    for toy in TOYS:
        distiller, _ = distil_toy(toy, toy_config(seed=seed), updates=UPDATES_WITH)
        reference = total_variance(teacher_samples(toy, MEASURED, seed=2))
        with distiller.averaged_student():
            variances = collapse(toy_teacher(toy), distiller.backbone.student, seed, updates)
        shares[toy] = [variance / reference for variance in variances]
    return {"updates": list(range(0, updates + 1, EVERY)), "variance_share": shares}


def collapse(
    teacher: nn.Module, student: nn.Module, seed: int, updates: int, lr: float = LR
) -> list[float]:
    """Total variance of the student's samples every ``EVERY`` updates, v_A = eps - x_0."""
    generator = Generator().manual_seed(seed)
    fixed = torch.randn(MEASURED, 2, generator=Generator().manual_seed(1))
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, updates)
    variances = []
    for update in range(updates + 1):
        if update % EVERY == 0:
            with torch.no_grad():
                variances.append(total_variance(one_step(student, fixed)))
        x0 = one_step(student, torch.randn(BATCH, 2, generator=generator))
        noise = torch.randn(BATCH, 2, generator=generator)
        t, r = sample_time_pairs(BATCH, generator=generator)
        x_t = interpolate(x0, noise, t)
        u_teacher = mean_velocity(
            lambda x, t: teacher(x, t, t), x_t.detach(), t, r, step_size=STEP_SIZE
        )
        optimizer.zero_grad()
        mfd_loss(x_t, u_teacher, (noise - x0).detach()).backward()
        optimizer.step()
        decay.step()
    return variances


def one_step(student: nn.Module, noise: Tensor) -> Tensor:
    """Samples ``[B, 2]`` of a student of one step."""
    return generate(lambda x, t: student(x, t, t), noise)


def total_variance(samples: Tensor) -> float:
    """Trace of the covariance of ``[N, D]``."""
    return samples.var(dim=0).sum().item()


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=1, title="Spread of the samples once the auxiliary is taken away")
    axis = figure.axes[0]
    for (toy, share), colour in zip(figures["variance_share"].items(), COLOURS, strict=False):
        axis.semilogy(figures["updates"], share, color=colour, label=toy.replace("_", " "))
    axis.axhline(0.01, color=GREY, linestyle="--", label="1 %")
    axis.legend(fontsize=8, frameon=False)
    titled(axis, "variance / teacher's variance", "student updates without the auxiliary")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    ends = {toy: (share[0], share[-1]) for toy, share in figures["variance_share"].items()}
    text = "; ".join(
        f"{toy.replace('_', ' ')} {first:.2f} to {last:.4f}" for toy, (first, last) in ends.items()
    )
    return Verdict.of(
        all(last < 0.01 for _, last in ends.values()),
        f"variance of the samples as a share of the teacher's: {text}",
    )
