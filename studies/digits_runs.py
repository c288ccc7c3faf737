"""Short distillations of the digits, measured: what several studies are made of."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from mfd_fast.distill.config import OptimConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.models import preset
from mfd_fast.models.digits.evaluate import Yardstick
from mfd_fast.models.digits.teacher import load_classifier, load_teacher
from mfd_fast.models.images import EVALUATION_SEED, TeacherSampler
from mfd_fast.run.config import RunConfig
from mfd_fast.run.loop import train
from mfd_fast.run.maker import make_distiller

REFERENCE_STEPS = 50


def digits_config(*, updates: int, batch_size: int = 64, **distill: Any) -> RunConfig:
    """The digits preset on the CPU with some settings of ``DistillConfig`` replaced."""
    base = preset("digits")
    return replace(
        base,
        distill=replace(base.distill, **distill),
        train=replace(base.train, updates=updates, batch_size=batch_size, device="cpu"),
    )


def student_lr(lr: float) -> OptimConfig:
    """The preset's optimizer of the student at another learning rate."""
    return replace(preset("digits").distill.student_optim, lr=lr)


def distil(
    config: RunConfig, on_row: Callable[[dict[str, Any]], None] = lambda row: None
) -> tuple[Distiller, list[dict[str, Any]], float]:
    """Train; the distiller, the logged rows and the seconds."""
    task = config.task()
    distiller = make_distiller(task.backbone(), config.distill)
    start = time.perf_counter()
    rows = train(distiller, task.conditions(), config.train, callbacks=[on_row])
    return distiller, rows, time.perf_counter() - start


@cache
def yardstick(num_samples: int, guidance: float) -> Yardstick:
    """The guided 50-step teacher's samples, drawn once for a whole study."""
    reference = TeacherSampler(load_teacher(), REFERENCE_STEPS, guidance)
    return Yardstick(load_classifier(), reference, num_samples=num_samples, seed=EVALUATION_SEED)


def measured(distiller: Distiller, num_samples: int) -> dict[str, float]:
    """Frechet distances, precision, recall and accuracy of the student's EMA weights."""
    row = yardstick(num_samples, distiller.config.guidance).row("student", distiller.generate)
    return {key: value for key, value in row.items() if isinstance(value, float)}


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter 0 for one value."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), numbers.std().item() if len(values) > 1 else 0.0


def every_update(config: RunConfig) -> RunConfig:
    """The same run with a row of metrics for every student update."""
    return replace(config, train=replace(config.train, log_every=1))
