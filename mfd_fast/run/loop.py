"""The training loop: cycles of updates, metrics read back every few of them, checkpoints, a stop.

Knows no concrete model and no file: what a run trains comes in as a Distiller, what it leaves
behind is written by callbacks and a Checkpointer.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.ranks import Ranks
from mfd_fast.run.checkpoint import Counts
from mfd_fast.run.checkpoint_writer import Checkpointer
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.launch import Vote
from mfd_fast.run.monitors import Monitors, check_skips
from mfd_fast.run.stop import Stopped, StopSignal

Callback = Callable[[dict[str, Any]], None]


class Progress:
    """How far a run is, besides what the Distiller knows: continued with it, bit for bit.

    metrics: of the last update of each role, device tensors; seconds: of training, over resumes.
    """

    def __init__(self, distiller: Distiller):
        config = distiller.config
        self.metrics: dict[str, torch.Tensor] = {}
        self.seconds = 0.0
        self.monitors = Monitors(
            distiller.backbone.device,
            aux_updates=config.aux_updates,
            student_updates=config.student_updates,
            sees_moves=config.aux_samples != "student",
        )

    def live_state(self, ranks: Ranks) -> dict[str, Any]:
        """The tensors themselves, which the next update changes, of all ranks: a collective call.

        Rank 0 alone writes them to a checkpoint.
        """
        monitors = self.monitors.live_state()
        return {
            "metrics": ranks.of_all(dict(self.metrics)),
            "seconds": self.seconds,
            "monitors": monitors | {"sums": ranks.of_all(monitors["sums"])},
        }

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Continue from :meth:`live_state`, or a copy of it."""
        device = self.monitors.device
        metrics, sums = ranks.own(state["metrics"]), ranks.own(state["monitors"]["sums"])
        self.metrics = {name: value.to(device) for name, value in metrics.items()}
        self.seconds = state["seconds"]
        self.monitors.load_state_dict(state["monitors"] | {"sums": sums})


def train(
    distiller: Distiller,
    next_cond: Callable[[int], Any],
    config: TrainConfig,
    callbacks: Iterable[Callback] = (),
    *,
    progress: Progress | None = None,
    checkpointer: Checkpointer | None = None,
    stop: StopSignal | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, Any]]:
    """Update until the student has had ``config.updates`` updates.

    Args:
        next_cond: n -> the condition of update number n (of either role, from 0), leaves
            ``[B, ...]`` with the rows of all ranks.
        callbacks: each is called with the row of metrics every ``config.log_every`` student
            updates; rank 0's alone should write.
        progress: what a resumed run continues from.
        checkpointer: writes checkpoints when they are due, at the end and when stopped.
        stop: asked after every update; raises ``Stopped`` once every rank has heard of it.
        warn: gets the sentences of the monitors.

    Returns:
        The rows: ``update`` (student updates so far), the metrics of both roles and the monitors'
        columns as floats, and ``updates_per_s`` (updates of either role per second since the row
        before), the one number that depends on the clock.
    """
    loop = _Loop(distiller, config, progress or Progress(distiller), checkpointer)
    vote = Vote(distiller.ranks)
    rows: list[dict[str, Any]] = []
    while distiller.num_updates["student"] < config.updates:
        role = loop.update(next_cond)
        if role == "student" and loop.is_row_due():
            rows.append(loop.row())
            for sentence in loop.progress.monitors.warnings(rows[-1]):
                warn(sentence)
            for callback in callbacks:
                callback(rows[-1])
            check_skips(rows[-1], config.max_skipped_in_a_row)
        if role == "student" and checkpointer and checkpointer.is_due(loop.done):
            loop.checkpoint()
        if stop and (signum := vote(stop.signum)):
            loop.leave(signum)
    vote.result()
    loop.checkpoint(wait=True)
    return rows


class _Loop:
    """One run of the loop: its clock, and what happens between two updates."""

    def __init__(
        self,
        distiller: Distiller,
        config: TrainConfig,
        progress: Progress,
        checkpointer: Checkpointer | None,
    ):
        self.distiller, self.config, self.progress = distiller, config, progress
        self.checkpointer = checkpointer
        self.since = self.started = time.perf_counter()
        self.seconds_before = progress.seconds
        self.updates_before = self.total

    @property
    def total(self) -> int:
        """Updates of both roles."""
        return sum(self.distiller.num_updates.values())

    @property
    def done(self) -> int:
        """Updates of the student."""
        return self.distiller.num_updates["student"]

    def update(self, next_cond: Callable[[int], Any]) -> str:
        """One update on this rank's rows; the role that was updated."""
        number, role = self.total, self.distiller.next_role
        cond = self.distiller.ranks.rows(self._cond(next_cond, number))
        metrics = self.distiller.step(cond)
        self.progress.metrics |= metrics
        self.progress.monitors.observe(number, role, metrics)
        return role

    def _cond(self, next_cond: Callable[[int], Any], number: int) -> Any:
        """The condition; if there is none (its file has vanished, a prompt is too long), what was
        learnt is saved first.

        Of several ranks one may fail alone: the others would wait for it, so none saves.
        """
        try:
            return next_cond(number)
        except Exception:
            if self.distiller.ranks.world == 1:
                self.checkpoint(wait=True)
            raise

    def is_row_due(self) -> bool:
        return self.done % self.config.log_every == 0 or self.done >= self.config.updates

    def row(self) -> dict[str, Any]:
        """The metrics, read from the device: the one wait for it; the mean over ranks."""
        metrics, monitors = self.progress.metrics, self.progress.monitors
        tensors = {**metrics, **monitors.sums}
        values = torch.stack([value.double() for value in tensors.values()]).tolist()
        read = dict(zip(tensors, self.distiller.ranks.mean(values), strict=True))
        now, updates = time.perf_counter(), self.total
        speed = (updates - self.updates_before) / (now - self.since)
        self.since, self.updates_before = now, updates
        return {
            "update": self.done,
            **{name: read[name] for name in metrics},
            **monitors.columns({name: read[name] for name in monitors.sums}),
            "updates_per_s": speed,
        }

    def checkpoint(self, *, wait: bool = False) -> None:
        """Save everything; in the background unless ``wait``."""
        if self.checkpointer is None:
            return
        self.progress.seconds = self.seconds_before + time.perf_counter() - self.started
        counts = Counts(self.done, self.distiller.num_updates["aux"])
        progress = self.progress.live_state(self.distiller.ranks)
        state = {"distiller": self.distiller.live_state(), "progress": progress}
        self.checkpointer.save(counts, state)
        if wait:
            self.checkpointer.wait()

    def leave(self, signum: int) -> None:
        """A last checkpoint, then ``Stopped``."""
        self.checkpoint(wait=True)
        raise Stopped(signum, f"stopped after update {self.done} of {self.config.updates}")
