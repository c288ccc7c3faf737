"""The folder a run leaves behind: one run writes it at a time, and nothing in it is overwritten
unless that run is resumed.

config.yaml        the resolved configuration
metrics.jsonl      one line per logged update
checkpoints/       see checkpoint.py
student.safetensors, results.json, *.png    written by the task at the end
.lock              held while a run writes here
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mfd_fast.files.whole import WRITING, write_text, written
from mfd_fast.run.config import RunConfig, save_config

CONFIG, METRICS, STUDENT, RESULTS, CHECKPOINTS = (
    "config.yaml",
    "metrics.jsonl",
    "student.safetensors",
    "results.json",
    "checkpoints",
)
LOCK = ".lock"


class RunFolder:
    """Paths and writers of one run: :meth:`create` a new one, :meth:`resume` or :meth:`open` one.

    The first two hold the folder's lock until :meth:`release` or the end of the process.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: Any = None
        self._unwritten: list[str] = []

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> "RunFolder":
        """A new run folder with its config; refuses a folder that already holds files."""
        path = Path(path)
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(
                f"{path} already holds files (a run?); nothing was changed. Choose another folder "
                "with --out, continue that run with --resume, or move it away"
            )
        run = cls(path)
        with run._as_value_error():
            run._take_lock()
            run.write_config(config)
        return run

    @classmethod
    def resume(cls, path: str | Path) -> "RunFolder":
        """The folder of a run to continue, or a new one if there is none yet."""
        path = Path(path)
        kept = {LOCK, CONFIG, CHECKPOINTS}
        if path.is_dir() and not (path / CONFIG).is_file():
            others = sorted(
                entry.name
                for entry in path.iterdir()
                if entry.name not in kept and not entry.name.startswith(WRITING)
            )
            if others:
                raise ValueError(
                    f"{path} is not a run folder: it has no {CONFIG}, but {others[0]}; nothing was "
                    "changed. Choose the run's folder with --out"
                )
        run = cls(path)
        with run._as_value_error():
            run._take_lock()
        return run

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

    def log(self, row: dict[str, Any]) -> str:
        """Append one line to metrics.jsonl; why that failed, empty if it did not.

        A line that could not be written is kept and written with the next one, so that a full disk
        does not end the run and no half line stays.
        """
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            self.flush()
        except OSError as error:
            return f"{self.path / METRICS} could not be written: {error.strerror}; tried again"
        return ""

    def flush(self) -> None:
        """Write the lines that are still to be written; ``OSError`` if that is not possible."""
        data = "".join(self._unwritten).encode()
        if not data:
            return
        with (self.path / METRICS).open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
        self._unwritten.clear()

    def history(self) -> list[dict[str, Any]]:
        """Every logged line, oldest first."""
        return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]

    def cut_history(self, update: int) -> None:
        """Drop the lines after a student update, and half a line that a killed run left."""
        path = self.path / METRICS
        if not path.exists():
            return
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= update
        ]
        if kept != lines:
            write_text(path, "".join(kept))

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml; it appears complete or not at all."""
        with written(self.path / CONFIG) as partial:
            save_config(config, partial)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file; it appears complete or not at all."""
        write_text(self.path / name, json.dumps(value, indent=2) + "\n")

    def release(self) -> None:
        """Let another run write here."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    @contextmanager
    def _as_value_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.release()
            raise ValueError(
                f"cannot write to the run folder {self.path}: {error.strerror or error}; choose a "
                "writable folder with --out"
            ) from None

    def _take_lock(self) -> None:
        """The kernel drops the lock with its process, so a killed run leaves none behind."""
        self.path.mkdir(parents=True, exist_ok=True)
        while True:
            lock = (self.path / LOCK).open("a+")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise ValueError(
                    f"{self.path} is in use by {holder}; wait for it, stop it, or choose another "
                    "folder with --out"
                ) from None
            if _is_same_file(lock, self.path / LOCK):  # its last holder may have removed it
                break
        lock.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        lock.flush()
        self._lock = lock


def _is_same_file(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
