"""A few cycles of a real run on this machine, to set beside what was predicted for it."""

import json
from typing import Any

import torch

from mfd_fast.cost.devices import Device, Efficiency, calibrate
from mfd_fast.distiller import Distiller
from mfd_fast.environment import ROOT
from mfd_fast.profiling.timer import PhaseTimer

RESULTS = ROOT / "bench/results"
ENGINE = ("captured", "fused", "lane-packed")  # the most complete variant that was measured


def measured_phases(distiller: Distiller, next_cond: Any, *, cycles: int = 3) -> dict[str, float]:
    """Mean seconds of every phase in one cycle, after a cycle that is not counted."""
    config = distiller.config
    updates = config.aux_updates + config.student_updates
    timer = PhaseTimer(distiller.backbone.device)
    for number in range((1 + cycles) * updates):
        if number == updates:
            distiller.phase = timer.phase
        distiller.step(next_cond(number))
    return {
        name: sum(seconds) / cycles
        for name, seconds in timer.seconds().items()
        if " > " not in name  # a phase inside another is part of it
    }


def efficiency_here(device: Device, preset: str) -> Efficiency:
    """The share of this device's rates that whole updates reached on it.

    From the student's update in ``bench/results/step_*.json`` of this device and this preset's
    family; without such a file, the rates themselves.  Launches are measured now.
    """
    rates = calibrate(device)
    for path in sorted(RESULTS.glob("step_*.json")):
        result = json.loads(path.read_text())
        same_family = result["config"]["model"].split("-")[0] == preset.split("-")[0]
        if not (same_family and device.name.startswith(result["device"])):
            continue
        rows = {row["variant"]: row for row in result["rows"] if row["update"] == "student"}
        row = next(rows[name] for name in ENGINE if name in rows)
        seconds = row["seconds_per_sample"] * row["batch"]
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        share = min(1.0, 1e9 * row["gflop"] / seconds / device.flops(dtype))
        shares = dict.fromkeys(rates.shares, share)
        source = f"bench/results/{path.name}, {row['variant']}; launches measured here"
        return Efficiency(shares, share, rates.host_seconds, source)
    return rates
