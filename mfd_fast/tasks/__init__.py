"""What a preset distils: the backbone, its conditions, and what a finished run shows."""

from importlib import import_module

from mfd_fast.config import RunConfig
from mfd_fast.tasks.base import Task


def make_task(config: RunConfig) -> Task:
    """The task of ``config``, imported by its ``TASK``."""
    module, name = config.TASK.split(":")
    return getattr(import_module(module), name)(config)


__all__ = ["Task", "make_task"]
