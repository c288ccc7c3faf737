"""What a run asks of a family of models: a config that knows its task, and the task.

A family is two classes (a complete one of under 100 lines: docs/your-model.md):

    class MyRun(RunConfig)    its settings as fields with defaults; ``task()`` makes the task;
                              ``shapes(device)`` if its teacher is too large to be built for an
                              estimate; ``gives_samples`` if it has data for the compared objectives
    class MyTask(Task)        ``backbone()`` and ``conditions()``; the rest has a default

A run calls, in this order: ``MyRun.task()``, ``check``, ``remarks``, ``conditions``, ``backbone``,
``schedule``, ``data``; then, while it trains, ``next_cond(n)`` and ``preview``; at its end
``save_student``, ``evaluate``, ``format_table``, ``draw_pictures``.  ``mfd-fast sample``,
``evaluate`` and ``export`` make the task of a finished run and call its method of that name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_map

from mfd_fast.backbones.lanes import Backbone
from mfd_fast.baselines.objectives import needs_of
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.times import Schedule
from mfd_fast.run.config import RunConfig
from mfd_fast.run.device import pick_device
from mfd_fast.run.folder import STUDENT, RunFolder
from mfd_fast.run.table import markdown_table

CURVES = "training_curves.png"


@dataclass(frozen=True)
class Shapes:
    """A backbone and its conditions without the weights, mostly on ``meta``.

    ``cond(batch)`` makes the condition of an update, leaves ``[batch, ...]``.
    """

    backbone: Backbone
    cond: Callable[[int], Any]
    schedule: Schedule | None = None


class Task:
    """One run of a family; loading a bad file is a ``ValueError`` or ``OSError``."""

    COLUMNS: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    """Of the result table: title, key of the row, format; empty: every key of its first row."""

    def __init__(self, config: RunConfig):
        check_samples(config)
        self.config = config
        self.used: dict[str, str] = {}  # by the backbone, for the table of a run's start
        self.device = pick_device(config.train.device)

    def backbone(self) -> Backbone:
        """Teacher, auxiliary and student on ``self.device``."""
        raise NotImplementedError(f"{type(self).__name__}.backbone")

    def conditions(self) -> Callable[[int], Any]:
        """``next_cond(n)``: the condition of update number n, both roles counted from 0.

        It keeps no state, so that a run continued at update n sees what it would have seen.  Leaves
        are ``[train.batch_size, ...]``; for an objective with ``uses_data``, (x_0, condition).
        """
        raise NotImplementedError(f"{type(self).__name__}.conditions")

    def check(self) -> dict[str, str]:
        """Look at every file and package that the run needs until its end, without loading weights;
        what was found, by name.

        ``ValueError``, ``OSError`` or ``ImportError`` as the run would raise it.
        """
        return pictures()

    def data(self) -> str:
        """A checksum of what the conditions are made from, wherever it lies; empty: packaged."""
        return ""

    def remarks(self, num_samples: int) -> list[str]:
        """What a result table of so few samples cannot tell."""
        return []

    def schedule(self) -> Schedule | None:
        """The times of the student's sampler; None: equal steps."""
        return None

    def preview(self, distiller: Distiller, path: Path) -> None:
        """A picture of the student as it is now, drawn between two updates."""
        raise ValueError(f"{self.config.preset} draws no samples; set train.preview_every 0")

    def save_student(self, distiller: Distiller, path: Path) -> None:
        """Write the student (EMA weights if kept) as safetensors."""
        weights = distiller.student_network().state_dict()
        save_file({name: x.contiguous() for name, x in weights.items()}, path)

    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        """The result table: one row per sampler of teacher and student."""
        return []

    def format_table(self, rows: list[dict[str, Any]]) -> str:
        """The table as text."""
        keys = rows[0].items() if rows else ()
        columns = [(key, key, "s" if isinstance(value, str) else ".4g") for key, value in keys]
        return markdown_table(rows, self.COLUMNS or columns) if rows else ""

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        """Sample grid and training curves of a finished run."""
        from mfd_fast.pictures.grids import training_curves

        training_curves(run.history(), run / CURVES)
        return [run / CURVES]

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        """Pictures of the student alone; ``num`` 0: as many as suit the task."""
        raise ValueError(f"{self.config.preset} draws no samples; its student is {run / STUDENT}")

    def usage(self, base: str) -> str:
        """Python that makes the student from its file, for its model card; ``base``: its teacher's
        id or name.
        """
        return (
            "from safetensors.torch import load_file\n\n"
            f'network.load_state_dict(load_file("{STUDENT}"))  # a network of the teacher\'s class'
        )

    def export(self, run: RunFolder, out: Path) -> Path:
        """The student as a full checkpoint in its teacher's layout; ``ValueError`` if
        student.safetensors is one already.
        """
        raise ValueError(f"{run / STUDENT} is a full checkpoint already; copy it")


def pictures(*needs: Callable[[], Any]) -> dict[str, str]:
    """The row of :meth:`Task.check` about pictures: none if all that they need is there.

    Pictures are not what a run is for: what they lack is told at its start, and does not stop it.
    """
    try:
        import_module("mfd_fast.pictures.grids")
        for need in needs:
            need()
    except (ImportError, OSError, ValueError) as error:
        return {"pictures": f"none will be drawn: {error}"}
    return {}


def check_samples(config: RunConfig) -> None:
    """``ValueError`` if the objective needs samples of the data and the family gives none."""
    objective = needs_of(config.distill)
    if (objective.uses_data or objective.second_time) and not config.gives_samples:
        raise ValueError(
            f"distill.objective={config.distill.objective!r} needs samples of the data, which "
            f"preset {config.preset!r} does not give: take --objective mfd, or preset digits or "
            "cifar10"
        )


def shapes_of_task(task: Task, device: str) -> Shapes:
    """The shapes of a task whose networks are small enough to be built."""
    cond = task.conditions()(0)
    if needs_of(task.config.distill).uses_data:
        _, cond = cond

    def rows(batch: int) -> Any:
        return tree_map(
            lambda x: torch.zeros(batch, *x.shape[1:], dtype=x.dtype, device=device), cond
        )

    return Shapes(task.backbone().to(device), rows, task.schedule())
