"""What was measured, for a prediction: whole updates in committed results, cycles run here.

    seconds of a phase = seconds at the device's rates / share + operators x host

``share`` and ``host`` of every phase come from updates that ``bench.updates.step`` measured on a
device at several batch sizes, by non-negative least squares of the relative error.
"""

import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mfd_fast.cost.devices import Device, Efficiency, Fit, Host, calibrate
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.phases import PhaseTimer
from mfd_fast.run.environment import ROOT

PACKAGED = Path(__file__).parent / "results"  # bench/results, as an installed package has it
RESULTS = PACKAGED if PACKAGED.is_dir() else ROOT / "bench/results"
# Below this ratio of singular values the batches say the same, and the host's part is unknown.
MIN_RANK = 0.02
ENGINE = ("fused", "lane-packed")  # the most complete variant without graphs that was measured


def measured_phases(distiller: Distiller, next_cond: Any, *, cycles: int = 3) -> dict[str, float]:
    """Mean seconds of every phase in one cycle, after a cycle that is not counted."""
    updates = distiller.cycle_length
    timer = PhaseTimer(distiller.backbone.device)
    for number in range((1 + cycles) * updates):
        if number == updates:
            distiller.phase = timer.phase
        distiller.step(next_cond(number))
    return timer.per_cycle(cycles)


def calibrated(
    device: Device, preset: str, *, is_captured: bool = False
) -> tuple[Device, Efficiency] | None:
    """The device's measured rates, and what of them the updates of a preset's family reached.

    None if ``bench/results`` has no ``step_*.json`` of this device and family.  ``is_captured``:
    the updates that ran as CUDA graphs, which may be none.
    """
    for path, result in _results(device, preset):
        rows = [row for row in result["rows"] if row["variant"] in _engine(result, is_captured)]
        if not rows:
            continue
        rates, file = result["config"]["rates"], f"bench/results/{path.name}"
        device = replace(
            device,
            bf16_tflops=rates["bf16_tflops"],
            fp32_tflops=rates["fp32_tflops"],
            bandwidth=1e9 * rates["gb_s"],
            source=f"rates measured, {file}; the rest {device.source}",
        )
        batches = ", ".join(str(batch) for batch in sorted({row["batch"] for row in rows}))
        source = f"{file}, {rows[0]['variant']}, batch {batches}"
        launch = 1e-6 * rates["host_us"]
        return device, Efficiency({}, 1.0, Host(launch, launch, "measured"), source, _fits(rows))
    return None


def efficiency_here(
    device: Device, preset: str, *, is_captured: bool = False
) -> tuple[Device, Efficiency]:
    """What is known of the machine at hand: updates of the family, else its own calibration, else
    the rates that were measured just now.
    """
    return best_known(device, preset, is_captured=is_captured) or (device, calibrate(device))


def best_known(
    device: Device, preset: str, *, is_captured: bool
) -> tuple[Device, Efficiency] | None:
    """:func:`calibrated`, else what ``mfd-fast calibrate`` measured, else None."""
    from mfd_fast.cost import own

    found = calibrated(device, preset, is_captured=is_captured)
    return found or own.known(device, is_captured=is_captured)


def _results(device: Device, preset: str) -> list[tuple[Path, dict[str, Any]]]:
    """Results of whole updates on the device, the preset's own first, then the one that does most.

    A name of ``DEVICES`` is a board whose full name has all its words: ``rtx4090``, ``a100-40gb``.
    """
    found = []
    for path in RESULTS.glob("step_*.json"):
        result = json.loads(path.read_text())
        model = result["config"]["model"]
        if model.split("-")[0] == preset.split("-")[0] and _is_of(device.name, result):
            found.append(
                (model != preset, -max(row["gflop"] for row in result["rows"]), path, result)
            )
    return [(path, result) for _, _, path, result in sorted(found, key=lambda entry: entry[:3])]


def _is_of(name: str, result: dict[str, Any]) -> bool:
    if result["driver"] is None:  # taken on a CPU
        return name == f"{result['device']}, {result['threads']} threads"
    return is_board(name, result["device"])


def is_board(name: str, full: str) -> bool:
    """Whether a name of ``DEVICES`` is the board of this full name, which has all its words."""
    words = re.findall(r"[a-z0-9]+", full.lower())
    pairs = {first + second for first, second in pairwise(words)}  # rtx4090 is an "RTX 4090"
    return name == full or set(name.split("-")) <= pairs.union(words)


def _engine(result: dict[str, Any], is_captured: bool) -> set[str]:
    """The most complete variant, and the batches that were measured with it."""
    names = {row["variant"] for row in result["rows"]}
    batches = {name for name in names if name.startswith("batch ")}
    if is_captured:
        return {"captured"} | batches if "captured" in names else set()
    engine = {name for name in ENGINE if name in names}
    if len(engine) > 1:
        engine = {ENGINE[0]}
    return engine if "captured" in names or not engine else engine | batches


def _fits(rows: list[dict[str, Any]]) -> dict[str, Fit]:
    """Of every phase that was counted in all rows of its role, and of the roles as a whole."""
    points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        points[row["update"]].append((row["at_rates"], row["operators"], row["seconds"]))
        for name, phase in row["phases"].items():
            if phase.get("at_rates"):
                points[name].append((phase["at_rates"], phase["operators"], phase["seconds"]))
    return {name: fit(known) for name, known in points.items()}


def fit(points: list[tuple[float, float, float]]) -> Fit:
    """The share and the host's seconds that explain (seconds at the rates, operators, seconds).

    Least squares of the relative error; where that gives either a negative sign, or there is one
    point, the host's part is 0.
    """
    factors = torch.tensor([[ideal / s, ops / s] for ideal, ops, s in points], dtype=torch.float64)
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    unit = factors / factors.norm(dim=0)
    if len(points) > 1 and torch.linalg.matrix_rank(unit, rtol=MIN_RANK) == 2:
        slope, host = torch.linalg.lstsq(factors, ones).solution.flatten().tolist()
        if slope > 0 and host >= 0:
            return Fit(1 / slope, host)
    ideal = factors[:, 0]
    return Fit(float(ideal.square().sum() / ideal.sum()), 0.0)
