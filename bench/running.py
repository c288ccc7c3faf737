"""How a benchmark is asked for, timed, and run in another process."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from mfd_fast.run.environment import ROOT

SMOKE_SHARE = 0.1  # of the time that a measurement takes: to see that it runs


class BenchmarkError(ValueError):
    """Something was not measured; what was is kept."""


@dataclass(frozen=True)
class Options:
    """The command line of every benchmark.

    repeats: timed updates or cycles of a row; 0: the benchmark's own number.
    """

    device: str = "cpu"
    smoke: bool = False
    only: str = ""
    with_compile: bool = True
    repeats: int = 0
    out: Path | None = None

    @property
    def share(self) -> float:
        """Of the time that a measurement takes."""
        return SMOKE_SHARE if self.smoke else 1.0

    def wants(self, case: str) -> bool:
        """Whether ``--only`` finds the case's name."""
        return bool(re.search(self.only, case))


def spread(samples: list[float], key: str, scale: float, digits: int) -> dict[str, float]:
    """Median, p10 and p90 of seconds (or of what ``scale`` makes of them), as columns."""
    tenths = quantiles([*samples, *samples], n=10, method="inclusive")
    values = {key: median(samples), f"{key}_p10": tenths[0], f"{key}_p90": tenths[-1]}
    return {name: round(scale * value, digits) for name, value in values.items()}


def timed(
    updates: dict[str, Callable[[], object]],
    repeats: int,
    device: str,
    *,
    warmup: int = 0,
    least: float = 0.0,
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds of the process) of every update; they take turns.

    ``warmup`` calls are not counted; ``least``: go on until that many seconds of each are.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in updates}
    spent, turn = 0.0, -warmup
    while turn < repeats or spent < least:
        for name, update in updates.items():
            start, used = time.perf_counter(), time.process_time()
            update()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - start, time.process_time() - used
            if turn >= 0:
                samples[name].append(taken)
                spent += taken[0] / len(updates)
        turn += 1
    return samples


def elsewhere(function: Callable[..., Any], *arguments: Any, **env: str) -> Any:
    """What ``function(*arguments)`` gives in a process of its own, by way of JSON.

    ``BenchmarkError`` if it fails; why is on stderr.
    """
    code = (
        f"import json; from {function.__module__} import {function.__name__} as run; "
        f"print(json.dumps(run(*{arguments!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"{function.__name__} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
