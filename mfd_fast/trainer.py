"""The training loop: cycles of updates, metrics read back every few of them, callbacks.

Knows no concrete model and no file: what a run trains comes in as a Distiller, what it leaves
behind is written by callbacks.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mfd_fast.config import TrainConfig
from mfd_fast.distiller import Distiller

Callback = Callable[[dict[str, Any]], None]


def train(
    distiller: Distiller,
    next_cond: Callable[[int], Any],
    config: TrainConfig,
    callbacks: Iterable[Callback] = (),
) -> list[dict[str, Any]]:
    """Update until the student has had ``config.updates`` updates.

    Args:
        next_cond: n -> the condition of update number n (of either role, from 0), leaves
            ``[B, ...]``.
        callbacks: each is called with the row of metrics every ``config.log_every`` student
            updates.

    Returns:
        The rows: ``update`` (student updates so far), the metrics of both roles as floats, and
        ``updates_per_s`` (updates of either role per second since the row before).
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, torch.Tensor] = {}
    since, updates_before = time.perf_counter(), sum(distiller.num_updates.values())
    while distiller.num_updates["student"] < config.updates:
        role = distiller.next_role
        metrics |= distiller.step(next_cond(sum(distiller.num_updates.values())))
        done = distiller.num_updates["student"]
        if role != "student" or (done % config.log_every and done < config.updates):
            continue
        values = _read(metrics)  # the one wait for the device
        now, updates = time.perf_counter(), sum(distiller.num_updates.values())
        speed = (updates - updates_before) / (now - since)
        since, updates_before = now, updates
        rows.append({"update": done, **values, "updates_per_s": speed})
        for callback in callbacks:
            callback(rows[-1])
    return rows


def _read(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
