"""Seconds of every phase of a ``Distiller``, by the host's clock or by events of the device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

PREFIX = "phase "  # of a phase's range in a trace of the profiler
_NOTHING = nullcontext()


def no_phase(name: str) -> AbstractContextManager:
    """What a ``Distiller`` enters around its phases until somebody listens: nothing."""
    return _NOTHING


class PhaseTimer:
    """Listens to a distiller: ``distiller.phase = timer.phase``.

    Args:
        device: "cuda" takes the time between two events on the current stream, so nothing waits
            until :meth:`seconds` is called; "cpu" the host's clock.

    A phase inside another is named by both, outer one first, and its time belongs to both.  While a
    CUDA graph is captured nothing is timed: events inside it would be part of the graph.
    """

    def __init__(self, device: torch.device | str):
        self.is_cuda = torch.device(device).type == "cuda"
        self.marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside; a range of this name appears in a profiler's trace."""
        if self.is_cuda and torch.cuda.is_current_stream_capturing():
            yield
            return
        self._open.append(name)
        with record_function(PREFIX + name):
            begin = self._mark()
            try:
                yield
            finally:
                path = " > ".join(self._open)
                self._open.pop()
                self.marks[path].append((begin, self._mark()))

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every time a phase ran, in order; waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return {
            name: [self._between(begin, end) for begin, end in pairs]
            for name, pairs in self.marks.items()
        }

    def per_cycle(self, cycles: int) -> dict[str, float]:
        """Mean seconds of every outer phase in one of so many cycles; waits for the device."""
        return {
            name: sum(seconds) / cycles
            for name, seconds in self.seconds().items()
            if " > " not in name  # a phase inside another is part of it
        }

    def _mark(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.is_cuda else end - begin


class BetweenRows:
    """Phases between the first and the second logged row of a run: a sample in steady state.

    A callback of ``trainer.train``; ``phases`` is empty until the second row.
    """

    def __init__(self, distiller: Any):
        self.distiller = distiller
        self.silent = distiller.phase
        self.timer = PhaseTimer(distiller.backbone.device)
        self.phases: dict[str, dict[str, float]] = {}
        self._rows = 0

    def __call__(self, row: dict[str, Any]) -> None:
        self._rows += 1
        if self._rows == 1:
            self.distiller.phase = self.timer.phase
        elif self._rows == 2:
            self.distiller.phase = self.silent
            self.phases = {
                name: {"seconds": sum(seconds) / len(seconds), "count": len(seconds)}
                for name, seconds in self.timer.seconds().items()
            }
