"""What ``sana.text_multiple`` costs: predicted seconds of a cycle, captures included.

Every length that comes costs its own warm-ups and captures, once; a coarse multiple pads more in
every update.  Seconds and launches are those of ``mfd-fast estimate``.  Assumed: the lengths of
prompts, log-normal and 300 tokens at most, and a launch from Python, as published traces of eager
loops have it.  Nothing is measured on a GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from bench.running import Options
from mfd_fast.cost import device_named, estimate
from mfd_fast.cost.devices import Host, assumed
from mfd_fast.cost.estimate import Estimate
from mfd_fast.cost.phases import cycle_phases
from mfd_fast.distill.graphs import WARMUP_CALLS
from mfd_fast.models import preset
from mfd_fast.models.sana.text.encoder import MAX_LENGTH

PRESET, GPU = "sana-1.6b", "h100"
MULTIPLES = (8, 16, 32, 64, 100, 150, 300)
LAUNCH_S = 35e-6  # of an operator, from Python
MEDIANS, SPREAD = (20, 60, 150), 0.6  # of the prompts' tokens, and of their logarithm


@lru_cache
def at(length: int) -> Estimate:
    """The run with every text padded to ``length``."""
    config = preset(PRESET)
    config = replace(config, sana=replace(config.sana, text_length=length))
    return estimate(config, device_named(GPU), assumed(is_captured=True))


def once(run: Estimate) -> float:
    """Seconds that a length costs once: warm-ups launched from Python, and the captures."""
    distill = run.config.distill
    updates = {"aux": distill.aux_updates, "student": distill.student_updates}
    launches = replace(assumed(is_captured=False), host=Host(LAUNCH_S, LAUNCH_S, "from Python"))
    eager = cycle_phases(run.cycle, run.device, launches)
    slower = {
        name: (phase.seconds.low - run.phases[name].seconds.low) / updates[name.split("/")[0]]
        for name, phase in eager.items()
    }
    launched = sum(
        LAUNCH_S * work.num_ops / updates[name.split("/")[0]]
        for name, work in run.cycle.phases.items()
    )
    return WARMUP_CALLS * sum(slower.values()) + launched


def row(multiple: int, median: int) -> dict:
    """One multiple for prompts of one median length."""
    tokens = torch.arange(1, MAX_LENGTH + 1, dtype=torch.float64)
    spread = torch.distributions.LogNormal(torch.tensor(float(median)).log(), SPREAD)
    share = spread.cdf(tokens) - spread.cdf(tokens - 1)
    share[-1] += 1 - share.sum()
    lengths = ((tokens / multiple).ceil() * multiple).clamp(max=MAX_LENGTH).int().tolist()
    shares: dict[int, float] = {}
    for length, part in zip(lengths, share.tolist(), strict=True):
        shares[length] = shares.get(length, 0.0) + part
    cycle = sum(part * at(length).cycle_seconds.low for length, part in shares.items())
    cycles = at(MAX_LENGTH).cycles
    come = {n: 1 - (1 - part) ** cycles for n, part in shares.items()}  # at all
    first = sum(part * once(at(n)) for n, part in come.items())
    return {
        "median_tokens": median,
        "multiple": multiple,
        "lengths": round(sum(come.values()), 1),
        "cycle_ms": round(1e3 * cycle, 2),
        "once_s": round(first, 2),
        "cycle_with_once_ms": round(1e3 * (cycle + first / cycles), 2),
        "rows_mb": round(sum(come[n] * rows_bytes(n) for n in shares) / 1e6, 1),
    }


def rows_bytes(length: int) -> float:
    """What the graphs of a length keep for good: the prepared rows, in proportion to it."""
    most, least = (at(n).memory["graph pool, integration"] for n in (MAX_LENGTH, 8))
    return (most - least) * length / (MAX_LENGTH - 8)


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    config = {
        "preset": PRESET,
        "gpu": GPU,
        "spread": SPREAD,
        "warmup_calls": WARMUP_CALLS,
        "launch_us": 1e6 * LAUNCH_S,
    }
    batches = ([row(multiple, median) for multiple in MULTIPLES] for median in MEDIANS)
    return "text_multiple", config, batches
