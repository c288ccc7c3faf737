"""What a preset distils: the backbone, its conditions, and what a finished run shows."""

from mfd_fast.config import RunConfig
from mfd_fast.tasks.base import Task


def make_task(config: RunConfig) -> Task:
    """The task of ``config.preset``."""
    from mfd_fast.tasks.digits import DigitsTask  # here: `mfd-fast --help` needs no model

    return {"digits": DigitsTask}[config.preset](config)


__all__ = ["Task", "make_task"]
