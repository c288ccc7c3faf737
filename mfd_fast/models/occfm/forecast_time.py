"""How long a forecast takes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ForecastTime:
    """Seconds of every forecast, from the first noise to the last class id."""

    seconds: tuple[float, ...]
    frames: int
    """Future frames of one forecast."""

    @property
    def latency(self) -> float:
        """Mean seconds of a forecast."""
        return statistics.mean(self.seconds)

    @property
    def forecasts_per_second(self) -> float:
        """1 / latency."""
        return 1 / self.latency

    @property
    def frames_per_second(self) -> float:
        """Future frames / latency, the other thing that is called FPS."""
        return self.frames / self.latency


def time_forecasts(
    forecast: Callable[[int], Any],
    *,
    num: int,
    frames: int,
    device: torch.device | str,
    warmup: int = 0,
) -> ForecastTime:
    """Time ``forecast(0), ..., forecast(num - 1)``, each alone, waiting for the device.

    Args:
        forecast: draws noise, samples and decodes window ``i``; no reading of data inside.
        num: forecasts that are timed.
        frames: future frames of one forecast.
        device: what they run on; on CUDA the time is the device's own, between two events.
        warmup: forecasts before the first timed one.  Published means often include it, so 0 is
            the published rule; a few more give what a running system sees.

    Raises:
        ValueError: ``num`` below 1.
    """
    if num < 1:
        raise ValueError(f"num must be >= 1, got {num}")
    measure = _cuda_seconds if torch.device(device).type == "cuda" else _host_seconds
    for _ in range(warmup):
        measure(forecast, 0)
    return ForecastTime(tuple(measure(forecast, i) for i in range(num)), frames)


def _cuda_seconds(forecast: Callable[[int], Any], i: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    forecast(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _host_seconds(forecast: Callable[[int], Any], i: int) -> float:
    begin = time.perf_counter()
    forecast(i)
    return time.perf_counter() - begin
