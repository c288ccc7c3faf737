"""What a preset distils: the backbone, its conditions, and what a finished run shows."""

from importlib import import_module

from mfd_fast.baselines.objectives import needs_of
from mfd_fast.run.config import RunConfig
from mfd_fast.run.task import Task

# Those that give samples of the data, and a student that takes a second time.
WITH_SAMPLES = (
    "mfd_fast.models.digits.task:DigitsTask",
    "mfd_fast.models.cifar10.task:Cifar10Task",
)


def make_task(config: RunConfig) -> Task:
    """The task of ``config``, imported by its ``TASK``.

    ``ValueError`` for an objective that needs samples of the data where a task gives none.
    """
    check_samples(config)
    module, name = config.TASK.split(":")
    return getattr(import_module(module), name)(config)


def check_samples(config: RunConfig) -> None:
    """``ValueError`` if the objective needs samples of the data and the preset gives none."""
    needs = needs_of(config.distill)
    if (needs.uses_data or needs.second_time) and config.TASK not in WITH_SAMPLES:
        raise ValueError(
            f"distill.objective={config.distill.objective!r} needs samples of the data, which "
            f"preset {config.preset!r} does not give: take --objective mfd, or preset digits or "
            "cifar10"
        )


__all__ = ["Task", "make_task"]
