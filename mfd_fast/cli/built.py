"""What the commands that measure need of a preset: its distiller, ready to update."""

from collections.abc import Callable
from typing import Any

from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.ranks import Ranks
from mfd_fast.run import session as runner
from mfd_fast.run.config import RunConfig


def built(config: RunConfig) -> tuple[Distiller, Callable[[int], Any]]:
    """The distiller of a preset and ``next_cond(n)``, the condition of its update number n."""
    task = config.task()
    return runner.distiller_of(task, config, Ranks()), task.conditions()
