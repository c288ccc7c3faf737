"""Step size of the mean velocities (paper Tables 2 and 7), and what bf16 has to do with it.

The official code keeps times and states of the solver in bf16; a step of .001 then moves neither as
it should.  This project keeps both in float32.  Measured on a mixture of eight Gaussians whose
velocity is known: the error of the mean velocity against a solve of 4,000 steps in float64, for
both arithmetics, and the energy distance of toy students that were trained with either.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.objectives import MeanFlowDistillation
from mfd_fast.flow.integrate import mean_velocity
from mfd_fast.flow.times import sample_time_pairs
from mfd_fast.ops import interpolate
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.loop import train
from studies.digits_runs import mean_and_spread
from studies.plots import BLUE, ORANGE, Figure, titled
from studies.toy_runs import distance_to_teacher, toy_config, toy_teacher
from studies.toys import mixture_velocity, sample_toy
from studies.verdict import Verdict

CLAIM = (
    "Very small steps (0.001) hurt performance due to accumulated numerical errors, moderate steps "
    "(0.005-0.02) perform best, large steps (0.1-0.5) degrade performance (5.3, Table 2)"
)
RULE = (
    "with times and states in bf16 the error of u is least at a moderate step (.005 to .03), and "
    "larger at .001, at .1 and at .5"
)
TOY = "gaussian_mixture"
STEP_SIZES = (0.001, 0.005, 0.01, 0.02, 0.03, 0.1, 0.5)
MODERATE = (0.005, 0.01, 0.02, 0.03)
TRAINED = (0.001, 0.02, 0.5)  # steps that students are trained with
ARITHMETICS = {"bf16": torch.bfloat16, "float32": torch.float32}
SAMPLES = 2000
EXACT_STEPS = 4000
NUM_SEEDS = 3
UPDATES = 150
BATCH = 128


def run(seed: int, folder: Path) -> dict[str, Any]:
    generator = Generator().manual_seed(seed)
    t, r = sample_time_pairs(SAMPLES, min_interval=0.05, generator=generator)
    noise = torch.randn(SAMPLES, 2, generator=generator)
    x = interpolate(sample_toy(TOY, SAMPLES, generator), noise, t)
    exact = exact_velocity(x, t, r)
    errors = [
        {"arithmetic": name, "step_size": h, "error": relative_error(name, x, t, r, h, exact)}
        for name in ARITHMETICS
        for h in STEP_SIZES
    ]
    pairs = [(name, h) for name in ARITHMETICS for h in TRAINED]
    runs = [(name, h, seed + i) for name, h in pairs for i in range(NUM_SEEDS)]
    found = in_two(trained_distance, runs)
    students = []
    for n, (name, h) in enumerate(pairs):
        distances = found[n * NUM_SEEDS : (n + 1) * NUM_SEEDS]
        mean, spread = mean_and_spread(distances)
        students.append(
            {"arithmetic": name, "step_size": h, "distance": mean, "distance_std": spread,
             "seeds": distances}
        )  # fmt: skip
    return {"toy": TOY, "samples": SAMPLES, "errors": errors, "students": students}


def in_two(function: Callable[..., float], calls: list[tuple]) -> list[float]:
    """What the calls return, from two processes of one thread each: the same on any machine."""
    threads = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(2, get_context("spawn"), **threads) as pool:
        return list(pool.map(function, *zip(*calls, strict=True)))


def exact_velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u over [r, t] ``[N, 2]`` float64, in ``EXACT_STEPS`` equal midpoint steps a sample."""
    x, t, r = x.double(), t.double(), r.double()
    start, h = x, (t - r) / EXACT_STEPS
    for i in range(EXACT_STEPS):
        time = t - i * h
        middle = x - h[:, None] / 2 * mixture_velocity(x, time)
        x = x - h[:, None] * mixture_velocity(middle, time - h / 2)
    return (start - x) / (t - r)[:, None]


def relative_error(
    arithmetic: str, x: Tensor, t: Tensor, r: Tensor, h: float, exact: Tensor
) -> float:
    """|u - exact| / |exact| over all samples."""
    if arithmetic == "float32":
        u = mean_velocity(mixture_velocity, x, t, r, step_size=h)
    else:
        u = rounded_mean_velocity(mixture_velocity, x, t, r, h, torch.bfloat16)
    return ((u.double() - exact).norm() / exact.norm()).item()


def rounded_mean_velocity(
    velocity, x: Tensor, t: Tensor, r: Tensor, h: float, dtype: torch.dtype
) -> Tensor:
    """u over [r, t] ``[N, 2]`` by Euler steps of h, times and states rounded to ``dtype``.

    A step that would pass r ends there; the network is asked in float32 at the rounded values.
    """
    start, time = x.to(dtype), t.to(dtype)
    end, x = r.to(dtype), x.to(dtype)
    for _ in range(round(1 / h) + 1):
        step = torch.minimum(torch.full_like(time, h), time - end)
        if not (step > 0).any():
            break
        v = velocity(x.float(), time.float().clamp_min(1e-3)).to(dtype)
        x = x - step[:, None] * v
        time = time - step
    span = (t.to(dtype) - end).float().clamp_min(1e-3)
    return (start - x).float() / span[:, None]


class RoundedFlow(MeanFlowDistillation):
    """MFD whose solver keeps times and states in bf16."""

    def ends(self, backbone, prepared, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Where teacher and auxiliary arrive ``[B, 2, 2]``."""
        span = (t - r)[:, None]
        fields = (backbone.teacher, backbone.aux)
        us = [
            rounded_mean_velocity(
                lambda x, time, f=f: f(x, time, prepared.cond),
                x_t, t, r, self.config.step_size, torch.bfloat16,
            )
            for f in fields
        ]  # fmt: skip
        return torch.stack([x_t - span * u for u in us], dim=1)

    def student_loss(self, backbone, prepared, x0, noise, table):
        t = table.times[0]
        x_t = self.noised(x0, noise, t)
        with torch.no_grad():
            ends = self.ends(backbone, prepared, x_t.detach(), t, t - table.span)
        return self.loss(x_t, ends, t, table.span)


def trained_distance(arithmetic: str, h: float, seed: int) -> float:
    """Energy distance to the teacher's samples of a student trained with this arithmetic."""
    config = toy_config(step_size=h, seed=seed)
    objective = RoundedFlow(config) if arithmetic == "bf16" else None
    backbone = CopiedBackbone(toy_teacher(TOY), sample_shape=(2,))
    distiller = Distiller(backbone, config, objective=objective)
    loop = TrainConfig(updates=UPDATES, batch_size=BATCH, device="cpu")
    cond = torch.empty(BATCH, 0)
    train(distiller, lambda n: cond, loop)
    return distance_to_teacher(TOY, distiller)


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=2, title="Step size of the mean velocities, in bf16 and in float32")
    left, right = figure.axes
    for name, colour in zip(ARITHMETICS, (ORANGE, BLUE), strict=True):
        rows = [row for row in figures["errors"] if row["arithmetic"] == name]
        left.loglog([r["step_size"] for r in rows], [r["error"] for r in rows], "o-",
                    color=colour, label=name)  # fmt: skip
        rows = [row for row in figures["students"] if row["arithmetic"] == name]
        right.errorbar(
            [row["step_size"] for row in rows],
            [row["distance"] for row in rows],
            yerr=[row["distance_std"] for row in rows],
            fmt="o-", color=colour, capsize=3, label=name,
        )  # fmt: skip
    right.set_xscale("log")
    left.legend(fontsize=8, frameon=False)
    titled(left, "error of u on the exact mixture", "h", "|u - exact| / |exact|")
    titled(right, f"students, {NUM_SEEDS} seeds, one sd", "h", "energy distance to the teacher")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    error = {(row["arithmetic"], row["step_size"]): row["error"] for row in figures["errors"]}
    best = min(STEP_SIZES, key=lambda h: error["bf16", h])
    least = min(error["bf16", h] for h in MODERATE)
    holds = best in MODERATE and all(error["bf16", h] > least for h in (0.001, 0.1, 0.5))
    text = "; ".join(
        f"{name} " + ", ".join(f"h {h:g} {error[name, h]:.2%}" for h in STEP_SIZES)
        for name in ARITHMETICS
    )
    students = ", ".join(
        f"{row['arithmetic']} h {row['step_size']:g} {row['distance']:.4f} "
        f"(sd {row['distance_std']:.4f})"
        for row in figures["students"]
    )
    return Verdict.of(
        holds, f"error of u: {text}; energy distance of students to the teacher: {students}"
    )
