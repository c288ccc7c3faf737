"""What the commands that measure need of a preset: its distiller, ready to update."""

from collections.abc import Callable
from typing import Any

from mfd_fast.captured import CapturedDistiller
from mfd_fast.config import RunConfig
from mfd_fast.distiller import Distiller
from mfd_fast.tasks import make_task


def make_distiller(config: RunConfig) -> tuple[Distiller, Callable[[int], Any]]:
    """The distiller of a preset and ``next_cond(n)``, the condition of its update number n."""
    task = make_task(config)
    kind = CapturedDistiller if config.train.capture else Distiller
    distiller = kind(task.backbone(), config.distill, schedule=task.schedule())
    return distiller, task.conditions()
