"""The folder a run leaves behind: made once, never overwritten.

config.yaml        the resolved configuration
metrics.jsonl      one line per logged update
student.safetensors, results.json, *.png    written by the task at the end
"""

import json
from pathlib import Path
from typing import Any

from mfd_fast.config import RunConfig, save_config
from mfd_fast.presets import load_config

CONFIG, METRICS, STUDENT, RESULTS = (
    "config.yaml",
    "metrics.jsonl",
    "student.safetensors",
    "results.json",
)


class RunFolder:
    """Paths and writers of one run; use :meth:`create` for a new one and :meth:`open` for an old
    one.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> "RunFolder":
        """A new run folder with its config; refuses a folder that already holds files."""
        path = Path(path)
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(
                f"{path} already holds files (a run?); nothing was changed. Choose another folder "
                "with --out, or move that one away"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            save_config(config, path / CONFIG)
        except OSError as error:
            raise ValueError(
                f"cannot write to the run folder {path}: {error.strerror}; choose a "
                "writable folder with --out"
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing, finished run."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise ValueError(
                f"{path} is not a run folder: it has no {CONFIG}. A run is made by "
                "mfd-fast distill PRESET --out FOLDER"
            )
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def config(self) -> RunConfig:
        return load_config(self.path / CONFIG)

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Every logged line, oldest first."""
        return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]

    def write_json(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n")
