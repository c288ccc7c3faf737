"""When a run is checkpointed: copied at the end of an update, written while training goes on.

At the boundary the tensors are copied to host memory, on a GPU without waiting for the copy; a
thread then writes, syncs and renames.  At most one checkpoint is being written.  What cannot be
written (a full disk) is removed again, told, and tried at the next checkpoint: the run goes on, and
the last good checkpoint stays.
"""

import json
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.distill.ranks import Ranks
from mfd_fast.files.whole import WRITING
from mfd_fast.run.checkpoint import (
    STATE,
    Counts,
    checkpoints_in,
    commit,
    pack,
    remove,
    tensors_name,
    write_bytes,
    write_tensors,
)
from mfd_fast.run.config import TrainConfig

PIECE_TIMEOUT_S = 900.0  # how long rank 0 waits for the other ranks' files
# What a rank with pieces leaves beside its file: its manifest entry, or that it could not write.
PART, ENTRY, FAILED = ".part", ".entry", ".failed"


class Checkpointer:
    """Writes the checkpoints of one run.

    Args:
        folder: where they go; made if missing.
        config: when, and which are kept.
        header: what every checkpoint tells besides the state.
        ranks: rank 0 writes what all share; with fsdp every rank writes its pieces.
        warn: gets one sentence when a checkpoint could not be written.
        resumed: the counts of the checkpoint that this run continues, or None.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        *,
        header: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
        warn: Callable[[str], None] = warnings.warn,
        resumed: Counts | None = None,
    ):
        self.folder, self.config, self.header, self.warn = Path(folder), config, header or {}, warn
        self.ranks = ranks or Ranks()
        self.session = self.ranks.broadcast_text(secrets.token_hex(4))
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._host: dict[str, Tensor] = {}
        self._num_files = 1
        self.continues(resumed)

    def continues(self, counts: Counts | None) -> None:
        """The run goes on from the checkpoint of these counts; None: from the start."""
        self._requested = self._written = counts

    def is_due(self, student_updates: int) -> bool:
        """Whether the run is checkpointed after this many student updates."""
        every = self.config.checkpoint_every
        return every > 0 and student_updates % every == 0

    def save(self, counts: Counts, state: Any) -> None:
        """Copy a tree of tensors and numbers now and write it in the background.

        Waits for the checkpoint before, and raises what went wrong with it unless it was an
        ``OSError``, which was only told.  The global random states of every rank are added: a
        collective call.
        """
        self.wait()
        if counts == self._requested:
            return
        self._requested = counts
        packed = pack({"header": self.header, **state, "rng": self._random_states()})
        self._num_files = self.ranks.world if packed.pieces else 1
        mine = packed.whole | packed.pieces if self.ranks.is_main else packed.pieces
        if not mine:
            return
        host, copied = self._copy_to_host(mine)
        self._writer = threading.Thread(
            target=self._write, args=(counts, packed.tree, host, copied), name="checkpoint"
        )
        self._writer.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what a writer could not handle."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def path(self, counts: Counts) -> Path:
        """Where the checkpoint of these counts is or would be."""
        return self.folder / str(counts)

    @property
    def last_written(self) -> Path | None:
        """The newest checkpoint that this run wrote completely."""
        return None if self._written is None else self.path(self._written)

    def _random_states(self) -> dict[str, list[Tensor]]:
        """The global generators of every rank: dropout and the like."""
        states = {"cpu": self.ranks.gather(torch.get_rng_state())}
        if torch.cuda.is_available():
            states["cuda"] = self.ranks.gather(torch.cuda.get_rng_state())
        return states

    def _copy_to_host(
        self, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The tensors in host memory that is kept for the next time; there once the event is."""
        on_gpu = any(x.is_cuda for x in tensors.values())
        for name, x in tensors.items():
            kept = self._host.get(name)
            if kept is None or kept.shape != x.shape or kept.dtype != x.dtype:
                self._host[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            self._host[name].copy_(x, non_blocking=True)
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        return {name: self._host[name] for name in tensors}, event

    def _write(
        self, counts: Counts, tree: Any, tensors: dict[str, Tensor], copied: torch.cuda.Event | None
    ) -> None:
        """What the thread does; it never raises."""
        temporary = self.folder / f"{WRITING}{counts}-{self.session}"
        try:
            if copied is not None:
                copied.synchronize()
            temporary.mkdir(parents=True, exist_ok=True)
            if self.ranks.is_main:
                self._write_main(temporary, counts, tree, tensors)
            else:
                self._write_pieces(temporary, tensors)
        except OSError as error:
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            self.warn(
                f"checkpoint {counts} could not be written: {error.strerror or error}. It is "
                "tried again at the next one; make room, or lower train.keep_last"
            )
        except BaseException as error:  # told by wait(): a thread has nobody to raise to
            self._error = error

    def _write_main(
        self, temporary: Path, counts: Counts, tree: Any, tensors: dict[str, Tensor]
    ) -> None:
        names = [tensors_name(rank, self._num_files) for rank in range(self._num_files)]
        entries = {names[0]: write_tensors(temporary / names[0], tensors)}
        entries[STATE] = write_bytes(temporary / STATE, json.dumps(tree).encode())
        entries |= {name: _entry_of(temporary / name) for name in names[1:]}
        commit(temporary, self.path(counts), entries)
        self._written = counts
        self._prune(counts)

    def _write_pieces(self, temporary: Path, tensors: dict[str, Tensor]) -> None:
        """This rank's file, then its entry for the manifest: rank 0 waits for that."""
        path = temporary / tensors_name(self.ranks.rank, self.ranks.world)
        try:
            entry = write_tensors(path, tensors)
            part = path.with_suffix(PART)
            part.write_text(json.dumps(entry))
            part.rename(path.with_suffix(ENTRY))
        except OSError:
            path.with_suffix(FAILED).touch()
            raise

    def _prune(self, newest: Counts) -> None:
        """Remove what neither keep_last nor keep_every keeps; later ones are not this run's."""
        every = self.config.keep_every
        found = [path for path in checkpoints_in(self.folder) if Counts.of(path) <= newest]
        for path in found[: -self.config.keep_last]:
            if every == 0 or Counts.of(path).student % every:
                remove(path)


def _entry_of(path: Path) -> dict[str, Any]:
    """Wait for another rank's file and take its entry; ``OSError`` if that rank failed."""
    deadline = time.monotonic() + PIECE_TIMEOUT_S
    entry = path.with_suffix(ENTRY)
    while not entry.exists():
        if path.with_suffix(FAILED).exists() or time.monotonic() > deadline:
            raise OSError(f"{path.name} did not come from its rank")
        time.sleep(0.05)
    value = json.loads(entry.read_text())
    entry.unlink()
    return value
