"""How good and how fast forecasts of occupancy are: teacher, student and two yardsticks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.flow.solvers import to_device
from mfd_fast.models.occfm import OccfmNetwork, forecast
from mfd_fast.models.occfm.data.classes import CLASSES, FREE, HISTORY
from mfd_fast.models.occfm.data.windows import OccupancyWindows
from mfd_fast.models.occfm.forecast_time import speeds, time_forecasts
from mfd_fast.models.occfm.scores import OccupancyCounts, OccupancyScores, frechet_scores
from mfd_fast.models.occfm.vae.fast_decoder import FastDecoder
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d
from mfd_fast.run.console import progress
from mfd_fast.run.table import markdown_table

Forecast = Callable[[Sequence[int]], Tensor]  # windows to class ids uint8 [B, 6, X, Y, Z]

BATCH_SIZE = 8  # windows of one evaluation; times are taken one by one
TIMED = 5  # forecasts behind a latency
SEED_STRIDE = 1_000_003  # between the noise of two evaluations of a set

# Column of the printed table: title, key of the row, format.
COLUMNS = (
    ("forecast", "name", "s"),
    ("NFE", "nfe", "d"),
    *((f"IoU {s} s", f"iou_{s}s", ".2f") for s in (1, 2, 3)),
    ("IoU", "iou_mean_of_frames", ".2f"),
    *((f"mIoU {s} s", f"miou_{s}s", ".2f") for s in (1, 2, 3)),
    ("mIoU", "miou_mean_of_frames", ".2f"),
    ("seconds", "latency", ".3f"),
    ("forecasts/s", "forecasts_per_second", ".2f"),
    ("frames/s", "frames_per_second", ".2f"),
)
DISTANCES = (("FID", "fid", ".3f"), ("FVD", "fvd", ".3f"))


@dataclass(frozen=True)
class Forecaster:
    """Noise and condition to class ids: a transition network and the decoder behind it."""

    network: OccfmNetwork
    decoder: FastDecoder
    steps: int
    guidance: float

    @property
    def nfe(self) -> int:
        """Network evaluations of one forecast; guidance doubles them."""
        return self.steps * (1 if self.guidance == 1.0 else 2)

    def __call__(self, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Class ids uint8 ``[B, 6, X, Y, Z]``."""
        latents = forecast(self.network, noise, cond, steps=self.steps, guidance=self.guidance)
        return decoded(self.decoder, latents)


class Windows:
    """Conditions, noise and truth of windows on the device of the networks.

    Args:
        windows: of a split with labels and latents.
        network: whose forecasts are measured; its shape and device.
    """

    def __init__(self, windows: OccupancyWindows, network: OccfmNetwork):
        self.windows, self.shape = windows, network.config.sample_shape
        self.device = next(network.parameters()).device

    def spread(self, num: int) -> list[int]:
        """``num`` windows, or all if there are fewer, evenly over the split."""
        num = min(num, len(self.windows))
        return [i * len(self.windows) // num for i in range(num)]

    def cond(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``history`` and ``trajectory`` of these windows."""
        return condition(self.windows.windows(rows), self.device)

    def truth(self, rows: Sequence[int]) -> Tensor:
        """Class ids uint8 ``[B, 6, X, Y, Z]`` of the future frames."""
        return self.windows.labels(rows)[:, HISTORY:].to(self.device)

    def seen(self, rows: Sequence[int]) -> Tensor:
        """Class ids uint8 ``[B, X, Y, Z]`` of the last frame of the history."""
        return self.windows.labels(rows)[:, HISTORY - 1].to(self.device)

    def noise(self, rows: Sequence[int], seed: int) -> Tensor:
        """Standard normal ``[B, 6, C, h, w]``, the same for a window on every device."""
        draws = [
            torch.randn(self.shape, generator=Generator().manual_seed(seed * SEED_STRIDE + row))
            for row in rows
        ]
        return torch.stack(draws).to(self.device)


def condition(batch, device: torch.device) -> dict[str, Tensor]:
    """What the network is given of an ``OccupancyBatch``."""
    return {
        "history": to_device(batch.latents[:, :HISTORY], device),
        "trajectory": to_device(batch.trajectory, device),
    }


@torch.no_grad()
def decoded(decoder: FastDecoder, latents: Tensor) -> Tensor:
    """Class ids uint8 ``[B, F, X, Y, Z]`` of latents ``[B, F, C, h, w]`` as the VAE makes them."""
    ids = decoder.decode_classes(latents.flatten(0, 1))
    return ids.to(torch.uint8).unflatten(0, latents.shape[:2])


def evaluate_forecasts(
    forecasters: Mapping[str, Forecaster],
    windows: Windows,
    vae: OccupancyVae,
    *,
    vae3d: OccupancyVae3d | None = None,
    num: int,
    seed: int,
) -> list[dict[str, Any]]:
    """IoU, mIoU and time of every forecaster on the same windows and noise.

    Two rows without network go before: ``last frame``, the last one given, unmoved; and ``VAE``,
    the true future through the VAE, which no forecast in its latents can beat by much.

    Returns:
        One dict a row: ``name``, ``nfe``, what ``OccupancyScores.row`` holds, ``class_iou`` (17
        numbers), ``unseen`` classes, ``num_windows``, with ``vae3d`` ``fid`` and ``fvd`` on its
        features, and, for forecasters, ``latency`` in seconds, ``forecasts_per_second`` and
        ``frames_per_second`` of one window at a time.
    """
    rows, frames = windows.spread(num), windows.shape[0]
    _, truth = (None, None) if vae3d is None else _measured(windows.truth, windows, rows, vae3d)

    def measured(name: str, nfe: int | None, forecast_of: Forecast) -> dict[str, Any]:
        scores, features = _measured(forecast_of, windows, rows, vae3d)
        row = _row(name, nfe, scores, len(rows))
        return row if vae3d is None else row | frechet_scores(truth, features, frames=frames)

    decoder = FastDecoder(vae)

    def last_frame(batch: Sequence[int]) -> Tensor:
        labels = windows.windows.labels(batch)
        return labels[:, HISTORY - 1 : HISTORY].expand_as(labels[:, HISTORY:]).to(windows.device)

    def through_vae(batch: Sequence[int]) -> Tensor:
        latents = windows.windows.windows(batch).latents[:, HISTORY:]
        return decoded(decoder, latents.to(windows.device))

    table = [
        measured("last frame", None, last_frame),
        measured("VAE", None, through_vae),
    ]
    for name, forecaster in progress(forecasters.items(), "evaluating"):

        def forecast_of(batch: Sequence[int], forecaster=forecaster) -> Tensor:
            return forecaster(windows.noise(batch, seed), windows.cond(batch))

        row = measured(name, forecaster.nfe, forecast_of)
        table.append(row | _time(forecaster, windows, rows, seed))
    return table


def _batches(rows: list[int]) -> list[list[int]]:
    return [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]


def _measured(
    forecast_of: Forecast, windows: Windows, rows: list[int], vae3d: OccupancyVae3d | None
) -> tuple[OccupancyScores, Tensor | None]:
    """Scores, and features of the clips ``[N, D]`` if there is a VAE of clips."""
    counts = OccupancyCounts(frames=windows.shape[0], free=FREE, device=windows.device)
    generator = Generator(windows.device).manual_seed(0)  # the same draws for every row
    features = []
    for batch in _batches(rows):
        ids = forecast_of(batch)
        counts.add(ids, windows.truth(batch))
        if vae3d is not None:
            features.append(vae3d.features(ids.long(), generator=generator))
    return counts.scores(), torch.cat(features) if features else None


def _row(name: str, nfe: int | None, scores: OccupancyScores, num: int) -> dict[str, Any]:
    times = dict.fromkeys(("latency", "forecasts_per_second", "frames_per_second"))
    return {
        "name": name,
        "nfe": nfe,
        "num_windows": num,
        **scores.row(),
        "class_iou": list(scores.class_iou),
        "unseen": list(scores.unseen),
        **times,
    }


def _time(forecaster: Forecaster, windows: Windows, rows: list[int], seed: int) -> dict[str, float]:
    timed = rows[:TIMED]
    conds = [windows.cond([row]) for row in timed]
    shape = (1, *windows.shape)
    generator = Generator(windows.device).manual_seed(seed)

    def one(i: int) -> Tensor:
        noise = torch.randn(shape, generator=generator, device=windows.device)
        return forecaster(noise, conds[i])

    seconds = time_forecasts(one, num=len(timed), device=windows.device, warmup=1)
    return speeds(seconds, windows.shape[0])


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of :func:`evaluate_forecasts` as a Markdown table."""
    table = markdown_table(rows, COLUMNS + (DISTANCES if "fvd" in rows[0] else ()))
    if unseen := rows[0]["unseen"]:
        names = ", ".join(CLASSES[label].replace("_", " ") for label in unseen)
        table += f"\n\nIn no frame of the truth, counted as 100 in every mIoU: {names}."
    return table
