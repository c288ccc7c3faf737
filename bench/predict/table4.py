"""Table 4 of the paper (SANA on one RTX PRO 6000) beside what ``mfd-fast estimate`` says.

Nothing is fitted: presets, data sheet and assumed shares are those of the command.
"""

from collections.abc import Iterator
from dataclasses import replace

from bench.running import Options
from mfd_fast.cost import device_named, estimate
from mfd_fast.cost.devices import assumed
from mfd_fast.cost.phases import cycle_phases, total
from mfd_fast.models import preset

GPU = "rtx-pro-6000"
PRESET = "sana-1.6b"
# Hours and gigabytes, Table 4 of the paper; its VSD is Diff-Instruct.
PAPER = {"mfd": (25, 20), "vsd": (22, 20)}


def row(objective: str) -> dict:
    """The estimate and the paper's numbers for one objective."""
    config = preset(PRESET)
    config = replace(config, distill=replace(config.distill, objective=objective))
    device = device_named(GPU)
    run = estimate(config, device, assumed(is_captured=True))
    eager = total(cycle_phases(run.cycle, device, assumed(is_captured=False)).values())
    work = run.cycle.total
    at_the_ceiling = work.flops * run.cycles / (device.bf16_tflops * 1e12) / 3600
    hours, gigabytes = PAPER[objective]
    return {
        "objective": objective,
        "paper_hours": hours,
        "paper_gb": gigabytes,
        "hours": round(run.seconds.high / 3600, 3),
        "eager_hours": [round(end * run.cycles / 3600, 3) for end in eager],
        "gb": round(sum(run.memory.values()) / 1e9, 2),
        "hours_at_the_data_sheet": round(at_the_ceiling, 3),
        "cycles": int(run.cycles),
        "tflop_a_cycle": round(work.flops / 1e12, 1),
        "evaluations": round(run.cycle.evaluations, 2),
        "seconds_a_cycle": round(run.cycle_seconds.high, 3),
        "eager_seconds_a_cycle": [round(end, 3) for end in eager],
        "paper_seconds_a_cycle": round(hours * 3600 / run.cycles, 1),
        "memory_gb": {name: round(size / 1e9, 3) for name, size in run.memory.items()},
    }


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    efficiency = assumed(is_captured=False)
    config = {
        "preset": PRESET,
        "gpu": GPU,
        "rates": device_named(GPU).source,
        "shares": efficiency.shares,
        "bandwidth_share": efficiency.bandwidth,
        "host_us": [round(us * 1e6, 1) for us in efficiency.host[:2]],
        "efficiency": efficiency.source,
    }
    return "table4", config, iter([[row(objective) for objective in PAPER]])
