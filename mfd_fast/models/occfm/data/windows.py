"""Batches of a prepared split, a function of the update's number alone: resuming needs no state."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mfd_fast.models.occfm.data.classes import HISTORY, WINDOW
from mfd_fast.models.occfm.data.store import OccupancyStore
from mfd_fast.models.order import shuffled


class OccupancyBatch(NamedTuple):
    """Windows of consecutive key frames."""

    latents: Tensor
    """float32 ``[B, 12, C, h, w]``, unscaled; absent history slots are zero."""
    trajectory: Tensor
    """float32 ``[B, 12, 2]``: metres from each frame to the next; absent history slots are zero."""


def shuffled_rows(num_rows: int, n: int, batch_size: int, seed: int) -> list[int]:
    """Rows of global update ``n`` (from 0): the next ``batch_size`` of an endless shuffled stream.

    Every row comes once an epoch, whatever the batch size; a batch may span two epochs.
    """
    first = n * batch_size
    return [shuffled(i, num_rows, seed) for i in range(first, first + batch_size)]


class OccupancyWindows:
    """The windows of a split: 6 frames of history, of which the oldest may be absent, 6 to come.

    Args:
        store: the split.
        history: how many history frames are real, 1 to 6; the others are zero in the latents and
            in the trajectory.
        stride: take every ``stride``-th start.

    Raises:
        ValueError: ``history`` out of range, or no scene is as long as a window.
    """

    def __init__(self, store: OccupancyStore, *, history: int = HISTORY, stride: int = 1):
        if not 1 <= history <= HISTORY:
            raise ValueError(f"history must be between 1 and {HISTORY} frames, got {history}")
        self.store = store
        self.absent = HISTORY - history
        self._starts = store.starts(WINDOW, stride=stride)
        if not len(self._starts):
            longest = max(count for _, count in store.scenes)
            raise ValueError(
                f"expected a scene of at least {WINDOW} key frames in {store.folder}, the longest "
                f"has {longest}; prepare longer scenes"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, n: int, batch_size: int, seed: int) -> OccupancyBatch:
        """The batch of global update ``n``, shuffled; see :func:`shuffled_rows`."""
        return self.windows(shuffled_rows(len(self), n, batch_size, seed))

    def windows(self, rows: Sequence[int]) -> OccupancyBatch:
        """The windows of these numbers, in this order."""
        latents = self._stack("latents", rows)
        trajectory = self._stack("trajectories", rows)
        latents[:, : self.absent] = 0
        trajectory[:, : self.absent] = 0
        return OccupancyBatch(latents, trajectory)

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Class ids uint8 ``[B, 12, X, Y, Z]`` of these windows, history and future."""
        return self._stack("labels", rows)

    def _stack(self, name: str, rows: Sequence[int]) -> Tensor:
        array = self.store.array(name)
        starts = self._starts[np.asarray(rows)]
        return torch.from_numpy(np.stack([array[start : start + WINDOW] for start in starts]))


class OccupancyClips:
    """Class ids of single key frames or of clips of them, for a VAE.

    Args:
        store: the split.
        length: frames of a clip; 1 for single frames.
        stride: take every ``stride``-th start.
    """

    def __init__(self, store: OccupancyStore, *, length: int = 1, stride: int = 1):
        self.store = store
        self.length = length
        self._starts = store.starts(length, stride=stride)
        if not len(self._starts):
            raise ValueError(f"expected a scene of at least {length} key frames in {store.folder}")

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, n: int, batch_size: int, seed: int) -> Tensor:
        """uint8 ``[B, length, X, Y, Z]`` of global update ``n``; see :func:`shuffled_rows`."""
        labels = self.store.array("labels")
        starts = self._starts[shuffled_rows(len(self), n, batch_size, seed)]
        return torch.from_numpy(np.stack([labels[start : start + self.length] for start in starts]))
