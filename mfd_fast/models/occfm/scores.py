"""How well occupancy is forecast: IoU of occupied space and mIoU of its classes, frame by frame.

    IoU = correct / (seen + positive - correct)

over a whole set, with seen: voxels of a class in the truth, positive: in the forecast, correct: in
both.  A class that the truth never shows in a frame counts as IoU 1, as Occ3D forecasting papers
do.  All voxels count; no visibility mask is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mfd_fast.metrics.frechet import frechet_distance

SECOND_FRAMES = {1: 1, 2: 3, 3: 5}
"""Seconds ahead -> number of the future frame, at 2 frames a second."""


@dataclass(frozen=True)
class OccupancyScores:
    """Results of a set, in percent."""

    iou: tuple[float, ...]
    """Occupied against empty, of every future frame."""
    miou: tuple[float, ...]
    """Plain mean over the classes, of every future frame."""
    class_iou: tuple[float, ...]
    """Of every class, mean over the future frames."""
    unseen: tuple[int, ...]
    """Classes that the truth shows in no frame: their IoU of 100 lifts the mean."""

    def row(self) -> dict[str, float]:
        """The numbers of a table: at 1, 2 and 3 s, their mean, and the mean of all frames."""
        row = {}
        for name, values in (("iou", self.iou), ("miou", self.miou)):
            at = {s: values[frame] for s, frame in SECOND_FRAMES.items() if frame < len(values)}
            row |= {f"{name}_{s}s": value for s, value in at.items()}
            row[f"{name}_mean_of_seconds"] = sum(at.values()) / len(at)
            row[f"{name}_mean_of_frames"] = sum(values) / len(values)
        return row


class OccupancyCounts:
    """Counters of a set, on the device of the grids; adding to them never waits for the device.

    ``counts`` is int64 ``[frames, 3, classes + 1]`` with seen, correct and positive on axis 1 and
    occupied space behind the classes; counters of replicas are summed by adding these tensors.

    Args:
        frames: future frames.
        free: class id of empty voxels; the classes that count are those below it.
        device: where the grids will be.
    """

    def __init__(self, *, frames: int, free: int, device: torch.device | str = "cpu"):
        self.free = free
        self.counts = torch.zeros(frames, 3, free + 1, dtype=torch.int64, device=device)

    def add(self, forecast: Tensor, truth: Tensor) -> None:
        """Count forecasts; both are class ids uint8 ``[B, frames, X, Y, Z]``.

        Raises:
            ValueError: another dtype or shape.
        """
        frames = self.counts.shape[0]
        if forecast.shape != truth.shape or forecast.ndim != 5 or forecast.shape[1] != frames:
            raise ValueError(
                f"expected forecast and truth of one shape [B, {frames}, X, Y, Z], got "
                f"{list(forecast.shape)} and {list(truth.shape)}"
            )
        if forecast.dtype != torch.uint8 or truth.dtype != torch.uint8:
            raise ValueError(
                f"expected class ids as uint8, got {forecast.dtype} and {truth.dtype}; convert "
                "with .to(torch.uint8)"
            )
        both = torch.where(forecast == truth, truth, self.free)
        occupied = (forecast != self.free) & (truth != self.free)
        for i, ids in enumerate((truth, both, forecast)):
            for label in range(self.free):
                self.counts[:, i, label] += (ids == label).sum((0, 2, 3, 4))
            hits = occupied if i == 1 else ids != self.free
            self.counts[:, i, self.free] += hits.sum((0, 2, 3, 4))

    def scores(self) -> OccupancyScores:
        """Percentages of everything counted so far; reads the device once."""
        seen, correct, positive = self.counts.cpu().double().unbind(1)
        union = (seen + positive - correct).clamp_min(1)
        percent = 100 * torch.where(seen == 0, 1.0, correct / union)
        classes, occupied = percent[:, : self.free], percent[:, self.free]
        unseen = (seen[:, : self.free].sum(0) == 0).nonzero().flatten()
        return OccupancyScores(
            iou=tuple(occupied.tolist()),
            miou=tuple(classes.mean(1).tolist()),
            class_iou=tuple(classes.mean(0).tolist()),
            unseen=tuple(unseen.tolist()),
        )


def frechet_scores(truth: Tensor, forecast: Tensor, *, frames: int) -> dict[str, float]:
    """``fvd`` over clips and ``fid`` over their single frames: squared Frechet distances.

    Args:
        truth, forecast: features of clips, frame by frame, ``[N, frames * D]`` and
            ``[M, frames * D]``; the published ones are pooled latents of a VAE of clips.
        frames: of a clip.

    Biased upwards with few clips: compare only equally many.
    """
    return {
        "fvd": frechet_distance(truth, forecast),
        "fid": frechet_distance(*(f.unflatten(1, (frames, -1)).flatten(0, 1)
                                  for f in (truth, forecast))),
    }  # fmt: skip
