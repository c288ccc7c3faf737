"""A few cycles of a preset on this machine: predicted beside measured, or under the profiler.

    python -m bench estimate_sana_1_6b --out bench/results
    python -m bench profile_digits --out FOLDER     # with the profiler's own trace.json.gz

What ``mfd-fast estimate PRESET --gpu this-machine`` and ``mfd-fast profile PRESET`` do, without a
checkpoint and without what reads the command line and draws: a SANA has its published sizes and
random weights, digits their packaged teacher.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.running import Options
from mfd_fast.cost import estimate, this_machine
from mfd_fast.cost.measured import efficiency_here, measured_phases
from mfd_fast.cost.profile import profile_cycles, summary
from mfd_fast.cost.table import side_by_side, text
from mfd_fast.distill.distiller import Distiller
from mfd_fast.models import preset
from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import make_distiller, run_is_captured

CYCLES = 3  # timed, after one that is not
SLOWEST = 20  # operators in the result


def ready(config: RunConfig) -> tuple[Distiller, Callable[[int], Any]]:
    """The preset's distiller on ``config.train.device``, and the condition of update number n."""
    torch.manual_seed(0)
    model = config.shapes(config.train.device)
    cond = model.cond(config.train.batch_size)
    return make_distiller(model.backbone, config.distill), lambda n: cond


def estimated(config: RunConfig, cycles: int) -> tuple[list[dict], dict[str, str]]:
    """A row for every phase and one for the cycle, and where the prediction comes from."""
    is_captured = run_is_captured(config, config.train.device)
    device, efficiency = efficiency_here(
        this_machine(config.train.device), config.preset, is_captured=is_captured
    )
    run = estimate(config, device, efficiency)
    taken = measured_phases(*ready(config), cycles=cycles)
    print(text(run), side_by_side(run, taken), sep="\n\n")
    spans = {name: phase.seconds for name, phase in run.phases.items()}
    pairs = {name: (spans[name].high if name in spans else 0.0, s) for name, s in taken.items()}
    pairs["cycle"] = (run.cycle_seconds.high, sum(taken.values()))
    rows = [
        {
            "phase": name,
            "predicted_ms": round(1e3 * predicted, 4),
            "measured_ms": round(1e3 * seconds, 4),
            "ratio": round(predicted / seconds, 4),
        }
        for name, (predicted, seconds) in pairs.items()
    ]
    return rows, {"rates": device.source, "efficiency": efficiency.source}


def profiled(
    config: RunConfig, cycles: int, trace: Path | None
) -> tuple[list[dict], dict[str, Any]]:
    """A row for every phase and family of operators, and what is of the whole cycle."""
    with tempfile.TemporaryDirectory() as folder:
        path = trace or Path(folder) / "trace.json"
        result = profile_cycles(*ready(config), path, cycles=cycles)
    print(summary(result))
    rows = [
        {"phase": name, "ms": round(1e3 * seconds, 4), "families_ms": _ms(result.families[name])}
        for name, seconds in result.phases.items()
    ]
    slowest = {
        name: {"calls": calls, "ms": round(1e3 * seconds, 4)}
        for name, (calls, seconds) in list(result.operators.items())[:SLOWEST]
    }
    return rows, {
        "waits": result.waits,
        "memory_mb": round(max(result.memory.values()) / 1e6, 1),
        "slowest": slowest,
    }


def _ms(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * value, 4) for name, value in seconds.items()}


def benchmark(options: Options, what: str, name: str) -> tuple[str, dict, Iterator[list[dict]]]:
    """``what`` is "estimate" or "profile" of the preset ``name``."""
    config, cycles = preset(name), options.repeats or (1 if options.smoke else CYCLES)
    config = replace(config, train=replace(config.train, device=options.device))
    settings = {"preset": name, "batch": config.train.batch_size, "cycles": cycles}
    if what == "estimate":
        rows, more = estimated(config, cycles)
    else:
        trace = options.out and options.out / "trace.json.gz"
        rows, more = profiled(config, cycles, trace)
    return what, settings | more, iter([rows])
