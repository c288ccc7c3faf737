"""The interface between the command line and a concrete model."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from mfd_fast.backbones.lanes import Backbone
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.times import Schedule
from mfd_fast.run.folder import RunFolder


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


class Task(Protocol):
    """One preset: built from its RunConfig; loading a bad file is a ``ValueError`` or
    ``OSError``.
    """

    device: torch.device

    def check(self) -> dict[str, str]:
        """Look at every file and package that the run needs until its end, without loading weights;
        what was found, by name.

        ``ValueError``, ``OSError`` or ``ImportError`` as the run would raise it.
        """
        ...

    def data(self) -> str:
        """A checksum of what the conditions are made from, wherever it lies; empty: packaged."""
        ...

    def remarks(self, num_samples: int) -> list[str]:
        """What a result table of so few samples cannot tell."""
        ...

    def backbone(self) -> Backbone:
        """Teacher, auxiliary and student on the configured device."""
        ...

    def conditions(self) -> Callable[[int], Any]:
        """``next_cond(n)``: the condition of update number n, both roles counted from 0.

        It keeps no state, so that a run continued at update n sees what it would have seen.
        """
        ...

    def schedule(self) -> Schedule | None:
        """The times of the student's sampler; None: equal steps."""
        ...

    def preview(self, distiller: Distiller, path: Path) -> None:
        """A picture of the student as it is now, drawn between two updates."""
        ...

    def save_student(self, distiller: Distiller, path: Path) -> None:
        """Write the student (averaged weights if kept) as safetensors."""
        ...

    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        """The result table: one row per sampler of teacher and student."""
        ...

    def format_table(self, rows: list[dict[str, Any]]) -> str:
        """The table as text."""
        ...

    def draw_pictures(self, run: RunFolder) -> list[Path]:
        """Sample grid and training curves of a finished run."""
        ...

    def sample(
        self, run: RunFolder, path: Path, *, num: int, seed: int, prompts: Sequence[str] = ()
    ) -> None:
        """Pictures of the student alone; ``num`` 0: as many as suit the task."""
        ...

    def export(self, run: RunFolder, out: Path) -> Path:
        """The student as a full checkpoint in its teacher's layout; ``ValueError`` if
        student.safetensors is one already.
        """
        ...
