"""Gradient fields under noise (paper D.2, Fig. 4): one velocity against the mean of N.

Teacher: the exact velocity of a Gaussian mixture.  Auxiliary: that of the shifted mixture, plus
independent normal noise at every evaluation: of the same variance at each, which is what C.3
derives 1/N from, and of the same total energy over all of them, which is how the paper's picture
was made.  VSD sees one evaluation at t, MFD the mean over N steps from t to r.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.flow.integrate import mean_velocity
from studies.plots import BLUE, GREEN, GREY, ORANGE, Figure, titled
from studies.toys import mixture_velocity
from studies.verdict import Verdict

CLAIM = (
    "VSD's field points in random directions, MFD's is smooth under noise of equal total energy; "
    "the variance of MFD's gradient scales inversely with the number of steps (D.2, C.3)"
)
RULE = (
    "mfd's mean angle to the noise-free field is below vsd's with noise of equal total energy and "
    "with equal noise at every evaluation, and with the latter the variance falls at every "
    "doubling of N; the slope is reported"
)
TIME, END = 0.6, 0.2
SHIFT = (0.4, 0.25)
NOISE_STD = 1.0
SIDE, EXTENT = 13, 2.6
DRAWS = 200
EQUAL_ENERGY = "mfd, equal energy"
STEPS = (1, 2, 4, 8, 16, 32, 64)
SHOWN_STEPS = 20


def run(seed: int, folder: Path) -> dict[str, Any]:
    generator = Generator().manual_seed(seed)
    x = grid()
    variances = [variance_of_mean(x, steps, generator) for steps in STEPS]
    stds = {"vsd": NOISE_STD, "mfd": NOISE_STD, EQUAL_ENERGY: NOISE_STD / SHOWN_STEPS**0.5}
    steps = {name: 1 if name == "vsd" else SHOWN_STEPS for name in stds}
    fields = {
        name: [difference(x, steps[name], generator, stds[name]) for _ in range(DRAWS)]
        for name in stds
    }
    clean = {name: difference(x, steps[name], None) for name in stds}
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


def noisy_auxiliary(generator: Generator | None, std: float = NOISE_STD):
    """The shifted mixture's velocity with fresh noise at every call; without, if None."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = mixture_velocity(x, t, torch.tensor(SHIFT))
        if generator is None:
            return v
        return v + std * torch.randn(x.shape, generator=generator)

    return velocity


def averaged(velocity, x: Tensor, steps: int) -> Tensor:
    """Mean velocity over ``[END, TIME]`` in N steps; one step is the velocity at TIME."""
    t, r = (torch.full((len(x),), time) for time in (TIME, END))
    return mean_velocity(velocity, x, t, r, step_size=(TIME - END) / steps)


def difference(
    x: Tensor, steps: int, generator: Generator | None, std: float = NOISE_STD
) -> Tensor:
    """u_A - u_T: where a descent step moves the points, reversed."""
    auxiliary = noisy_auxiliary(generator, std)
    return averaged(auxiliary, x, steps) - averaged(mixture_velocity, x, steps)


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
    figure = Figure(columns=4, title="Gradient fields under noise in the auxiliary", height=4.2)
    titles = (
        ("vsd", "one evaluation", ORANGE),
        ("mfd", f"mean of {SHOWN_STEPS}", BLUE),
        (EQUAL_ENERGY, f"mean of {SHOWN_STEPS}", GREEN),
    )
    for axis, (name, words, colour) in zip(figure.axes, titles, strict=False):
        field = torch.tensor(figures["field"][name])
        field = field / field.norm(dim=1).mean()
        axis.quiver(x[:, 0], x[:, 1], field[:, 0], field[:, 1], color=colour, scale=28, width=0.005)
        titled(axis, f"{name}: {words},\noff by {figures['angle_degrees'][name]:.0f} degrees")
        axis.set_aspect("equal")
    axis = figure.axes[3]
    axis.loglog(figures["steps"], figures["variance"], "o-", color=BLUE, label="measured")
    ideal = [NOISE_STD**2 / n for n in figures["steps"]]
    axis.loglog(figures["steps"], ideal, "--", color=GREY, label="1/N")
    axis.legend(fontsize=8, frameon=False)
    titled(axis, f"variance of u_A: slope {figures['slope']:.2f}", "steps N", "variance")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    angles, variances = figures["angle_degrees"], figures["variance"]
    falls = all(after < before for before, after in pairwise(variances))
    return Verdict.of(
        falls and max(angles["mfd"], angles[EQUAL_ENERGY]) < angles["vsd"],
        f"mean angle to the noise-free field {angles['vsd']:.0f} degrees (vsd), "
        f"{angles['mfd']:.0f} (mfd, N = {SHOWN_STEPS}, equal noise an evaluation), "
        f"{angles[EQUAL_ENERGY]:.0f} (equal total energy); slope of log variance against log N "
        f"{figures['slope']:.3f}",
    )
