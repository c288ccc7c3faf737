"""Gradient fields under noise (paper D.2, Fig. 4): one velocity against the mean of N.

Teacher: the exact velocity of a Gaussian mixture.  Auxiliary: that of the shifted mixture, plus
independent normal noise of the same variance at every evaluation.  VSD sees one evaluation at t,
MFD the mean over N steps from t to r.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.flow.integrate import mean_velocity
from studies.plots import BLUE, GREY, ORANGE, Figure, titled
from studies.toys import mixture_velocity
from studies.verdict import Verdict

CLAIM = (
    "VSD's field points in random directions, MFD's is smooth; the variance of MFD's gradient "
    "falls as 1/N"
)
RULE = "the slope is within 0.1 of -1 and mfd's mean angle is below vsd's"
TIME, END = 0.6, 0.2
SHIFT = (0.4, 0.25)
NOISE_STD = 1.0
SIDE, EXTENT = 13, 2.6
DRAWS = 200
STEPS = (1, 2, 4, 8, 16, 32, 64)
SHOWN_STEPS = 20


def run(seed: int, folder: Path) -> dict[str, Any]:
    generator = Generator().manual_seed(seed)
    x = grid()
    variances = [variance_of_mean(x, steps, generator) for steps in STEPS]
    exact = difference(x, SHOWN_STEPS, None)
    fields = {
        "vsd": [difference(x, 1, generator) for _ in range(DRAWS)],
        "mfd": [difference(x, SHOWN_STEPS, generator) for _ in range(DRAWS)],
    }
    clean = {"vsd": difference(x, 1, None), "mfd": exact}
    return {
        "noise_std": NOISE_STD,
        "interval": [TIME, END],
        "steps": list(STEPS),
        "variance": variances,
        "slope": log_slope(STEPS, variances),
        "angle_degrees": {name: angle(fields[name], clean[name]) for name in fields},
        "shown_steps": SHOWN_STEPS,
        "grid": x.tolist(),
        "field": {name: fields[name][0].tolist() for name in fields},
    }


def grid() -> Tensor:
    """Points ``[SIDE^2, 2]`` of the plane."""
    line = torch.linspace(-EXTENT, EXTENT, SIDE)
    return torch.cartesian_prod(line, line)


def noisy_auxiliary(generator: Generator | None):
    """The shifted mixture's velocity with fresh noise at every call; without, if None."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = mixture_velocity(x, t, torch.tensor(SHIFT))
        if generator is None:
            return v
        return v + NOISE_STD * torch.randn(x.shape, generator=generator)

    return velocity


def averaged(velocity, x: Tensor, steps: int) -> Tensor:
    """Mean velocity over ``[END, TIME]`` in N steps; one step is the velocity at TIME."""
    t, r = (torch.full((len(x),), time) for time in (TIME, END))
    return mean_velocity(velocity, x, t, r, step_size=(TIME - END) / steps)


def difference(x: Tensor, steps: int, generator: Generator | None) -> Tensor:
    """u_A - u_T: where a descent step moves the points, reversed."""
    return averaged(noisy_auxiliary(generator), x, steps) - averaged(mixture_velocity, x, steps)


def variance_of_mean(x: Tensor, steps: int, generator: Generator, draws: int = DRAWS) -> float:
    """Variance of u_A over the noise, mean over points and coordinates."""
    means = [averaged(noisy_auxiliary(generator), x, steps) for _ in range(draws)]
    return torch.stack(means).var(dim=0).mean().item()


def log_slope(steps: tuple[int, ...], variances: list[float]) -> float:
    """Least-squares slope of log Var against log N."""
    n, v = (torch.tensor(values, dtype=torch.float64).log() for values in (steps, variances))
    n, v = n - n.mean(), v - v.mean()
    return ((n * v).sum() / n.square().sum()).item()


def angle(draws: list[Tensor], clean: Tensor) -> float:
    """Mean angle in degrees between noisy and noise-free vectors."""
    cosine = torch.nn.functional.cosine_similarity(torch.stack(draws), clean[None], dim=-1)
    return math.degrees(cosine.clamp(-1, 1).acos().mean().item())


def draw(figures: dict[str, Any], path: Path) -> None:
    x = torch.tensor(figures["grid"])
    figure = Figure(columns=3, title="Gradient fields under noise in the auxiliary", height=4.2)
    titles = (("vsd", "one evaluation", ORANGE), ("mfd", f"mean of {SHOWN_STEPS}", BLUE))
    for axis, (name, words, colour) in zip(figure.axes, titles, strict=False):
        field = torch.tensor(figures["field"][name])
        field = field / field.norm(dim=1).mean()
        axis.quiver(x[:, 0], x[:, 1], field[:, 0], field[:, 1], color=colour, scale=28, width=0.005)
        titled(axis, f"{name}: {words}, off by {figures['angle_degrees'][name]:.0f} degrees")
        axis.set_aspect("equal")
    axis = figure.axes[2]
    axis.loglog(figures["steps"], figures["variance"], "o-", color=BLUE, label="measured")
    ideal = [NOISE_STD**2 / n for n in figures["steps"]]
    axis.loglog(figures["steps"], ideal, "--", color=GREY, label="1/N")
    axis.legend(fontsize=8, frameon=False)
    titled(axis, f"variance of u_A: slope {figures['slope']:.2f}", "steps N", "variance")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    angles = figures["angle_degrees"]
    holds = abs(figures["slope"] + 1) < 0.1 and angles["mfd"] < angles["vsd"]
    return Verdict.of(
        holds,
        f"slope of log Var against log N {figures['slope']:.3f}; mean angle to the noise-free "
        f"field {angles['vsd']:.0f} degrees (vsd) and {angles['mfd']:.0f} (mfd, N = {SHOWN_STEPS})",
    )
