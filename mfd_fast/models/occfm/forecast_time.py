"""How long a forecast takes."""

import time
from collections.abc import Callable
from typing import Any

import torch


def time_forecasts(
    forecast: Callable[[int], Any], *, num: int, device: torch.device | str, warmup: int = 0
) -> list[float]:
    """Seconds of ``forecast(0), ..., forecast(num - 1)``, each alone, waiting for the device.

    Args:
        forecast: draws noise, samples and decodes window ``i``; no reading of data inside.
        num: forecasts that are timed.
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
    return [measure(forecast, i) for i in range(num)]


def speeds(seconds: list[float], frames: int) -> dict[str, float]:
    """Mean seconds of a forecast of ``frames`` future frames, and both things called FPS."""
    latency = sum(seconds) / len(seconds)
    rates = {"forecasts_per_second": 1 / latency, "frames_per_second": frames / latency}
    return {"latency": latency, **rates}


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
