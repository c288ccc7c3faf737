"""Whole updates, one switch at a time, from the literal loop to the whole engine: a waterfall.

    python -m bench step_sana_mini --out bench/results

    published         the literal loop that also encodes its prompts and writes an image
    literal           diffusers + PEFT, one network call after another (``bench.updates.literal``)
    literal compiled  the same with its transformer under torch.compile
    literal regional  the same with every block compiled by itself, as trainers do
    sequential        our engine on the network as its authors wrote it, one lane a call
    lane-packed       all lanes of an ODE step in one call
    prepared          our network: conditions prepared once, operators from PyTorch
    fused             the same with the compiled operators
    captured          the same as CUDA graphs; only on a GPU
    cheap, block      less is kept for the backward (``mfd_fast.backbones.activation``)
    batch N           N samples an update
    ab2               a second-order solver with twice the step: half the evaluations
    fp8               matmuls of the lanes without gradient in 8 bits; only on a GPU

Every variant has the same interval and runs in a process of its own: updates of each role that are
not counted, one whose operators are, then the timed ones.  Digits have no other network and no
operators of their own; OccFM's ``sequential`` and ``lane-packed`` are on the network as specified.
Without diffusers and peft SANA's first six are skipped by name.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from bench.running import BenchmarkError, Options, elsewhere, spread, timed
from bench.updates.nvml import Nvml
from bench.updates.variants import (
    INTERVAL,
    STEP,
    Loop,
    cycle_of,
    make_loop,
    samples_of,
    variants_of,
    working_dtype,
)
from mfd_fast.cost.devices import Device, Efficiency, Host, calibrate, this_machine
from mfd_fast.cost.phases import phase_of
from mfd_fast.cost.profile import WAITS
from mfd_fast.cost.trace import Trace, Work
from mfd_fast.distill.phases import PhaseTimer
from mfd_fast.run.environment import peak_memory, peak_memory_counts

WARMUP = {"cpu": 1, "cuda": 4}  # updates after the counted one; the fourth captures its graphs
MIN_SECONDS = {"cpu": 0.0, "cuda": 1.0}  # of timed updates: the driver sums energy every 20-100 ms
REPEATS = 5  # timed updates of a row
SMOKE = "sequential|lane-packed|fused|captured"
# What the host calls to give the device work; a graph is one launch.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync",
            "cudaMemsetAsync")  # fmt: skip
NVML_COUNTS = "the whole GPU: contexts of this process and of the one that started it included"
HOST_READ = "_local_scalar_dense"  # Python reads a value: a wait, unless it is the host's own


def measure(
    model: str, variant: str, device: str, repeats: int, rates: dict[str, float]
) -> list[dict]:
    """A row for each role; ``rates`` are :func:`rates_here`."""
    torch.manual_seed(0)
    loop = make_loop(model, variant, device)
    kind = torch.device(device).type
    counted = {role: _count(loop, role) for role in loop.updates}
    loop.finish()
    rows = []
    for role, update in loop.updates.items():
        for _ in range(WARMUP[kind]):
            update()
        row = {"variant": variant, "update": role, "batch": samples_of(model, variant)}
        row |= _timed(loop, update, repeats, kind, row["batch"])
        row |= _work_columns(counted[role], rates) | _launches(update, kind)
        for name, phase in row["phases"].items():
            phase |= _work_of(counted[role].get(name), rates)
        rows.append(row)
    return rows


def _count(loop: Loop, role: str) -> dict[str, Work]:
    """The work of one update by phase, after one that makes what is made once."""
    loop.updates[role]()
    silent = loop.listened.phase
    with Trace(loop.shares) as trace:
        loop.listened.phase = trace.phase
        loop.updates[role]()
    loop.listened.phase = silent
    return trace.work


def _timed(loop: Loop, update: Callable, repeats: int, kind: str, batch: int) -> dict[str, Any]:
    """Seconds of updates and phases, throughput, memory and energy."""
    timer, nvml = PhaseTimer(kind), Nvml.open() if kind == "cuda" else None
    if kind == "cuda":
        update_from_empty_cache(update)
    silent, loop.listened.phase = loop.listened.phase, timer.phase
    joules = nvml.joules() if nvml else None
    taken = timed({"": update}, repeats, kind, least=MIN_SECONDS[kind])[""]
    clock, processor = zip(*taken, strict=True)
    if joules is not None:
        joules = (nvml.joules() - joules) / len(clock)
    loop.listened.phase = silent
    seconds = median(clock)
    return {
        **spread(clock, "seconds", 1.0, 5),
        "cpu_seconds": round(median(processor), 5),
        "seconds_per_sample": round(seconds / batch, 6),
        "updates_per_s": round(1 / seconds, 4),
        "samples_per_s": round(batch / seconds, 4),
        "peak_mb": round(peak_memory(kind) / 1e6, 1),
        "nvml_mb": round(nvml.used_bytes() / 1e6, 1) if nvml else None,
        "joules": None if joules is None else round(joules, 3),
        "repeats": len(clock),
        "phases": {
            name: {"seconds": round(median(taken), 6)} for name, taken in timer.seconds().items()
        },
    }


def update_from_empty_cache(update: Callable) -> None:
    """One more update, which takes again what it needs: the peak is that of updates alone.

    Making a network passes through more memory than its updates.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    update()
    torch.cuda.synchronize()


def _work_columns(counted: dict[str, Work], rates: dict[str, float]) -> dict[str, Any]:
    """Of the whole update: operators, their operations, values that the host reads."""
    total = Work()
    for work in counted.values():
        total.add(work)
    reads = sum(count for op, count in total.calls.items() if op.name == HOST_READ)
    return _work_of(total, rates) | {"host_reads": int(reads), "gflop": round(total.flops / 1e9, 3)}


def _work_of(work: Work | None, rates: dict[str, float]) -> dict[str, Any]:
    """Operators, and seconds if the device reached ``rates``; nothing for what was not counted.

    The graphs of a captured update are not: its parts were, while it warmed up.
    """
    if work is None:
        return {}
    device = Device("", rates["bf16_tflops"], rates["fp32_tflops"], 1e9 * rates["gb_s"], 0, 0, 0)
    seconds = phase_of(work, device, Efficiency({}, 1.0, Host(0.0, 0.0, ""), "")).device
    return {"at_rates": round(seconds, 7), "operators": round(work.num_ops)}


def _launches(update: Callable, kind: str) -> dict[str, int | None]:
    """Launches of one update and waits of the host in it, by the profiler; None on a CPU."""
    if kind != "cuda":
        return {"launches": None, "waits": None}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        update()
        waited = torch.cuda.Event()
        waited.record()
        while not waited.query():  # a wait by the driver's call would be counted
            time.sleep(1e-3)
    calls = Counter(event.name for event in profiler.events())
    launches = sum(n for name, n in calls.items() if name.startswith(LAUNCHES))
    return {"launches": launches, "waits": sum(calls[name] for name in WAITS)}


def add_rates(rows: list[dict], rates: dict[str, float], cycle: tuple[int, int]) -> None:
    """Columns that need more than a row: achieved rate, its share of a matmul's, cycles an hour.

    ``rows`` are the two roles of one variant; ``rates`` has ``tflops`` of a large matmul.
    """
    for row in rows:
        achieved = row["gflop"] / row["seconds"] / 1e3
        row["tflop_s"] = round(achieved, 4)
        row["product_share"] = round(achieved / rates["tflops"], 4)
    seconds = sum(n * row["seconds"] for n, row in zip(cycle, rows, strict=True))
    for row in rows:
        row["cycles_per_hour"] = round(3600 / seconds, 2)


def rates_here(device: str) -> dict[str, float]:
    """What this device reaches in large operators; the unit that shares are shares of."""
    here = this_machine(device)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # the variants run beside this process
    return {
        "tflops": round(here.flops(working_dtype(device)) / 1e12, 4),
        "bf16_tflops": round(here.bf16_tflops, 4),
        "fp32_tflops": round(here.fp32_tflops, 4),
        "gb_s": round(here.bandwidth / 1e9, 2),
        "host_us": round(calibrate(here, device).host.low * 1e6, 3),
    }


def benchmark(options: Options, model: str) -> tuple[str, dict, Iterator[list[dict]]]:
    """Every variant of a model; ``prepared`` without compiled operators."""
    device, repeats = options.device, 1 if options.smoke else options.repeats or REPEATS
    rates, cycle = rates_here(device), cycle_of(model)
    config = {"model": model, "interval": INTERVAL, "step": STEP, "repeats": repeats}
    config |= {"peak_mb": peak_memory_counts(device), "nvml_mb": NVML_COUNTS}
    only = options if options.only or not options.smoke else replace(options, only=SMOKE)

    def batches() -> Iterator[list[dict]]:
        failed = []
        for variant in filter(only.wants, variants_of(model, device)):
            backend = {"MFD_FAST_BACKEND": "reference"} if variant == "prepared" else {}
            try:
                rows = elsewhere(measure, model, variant, device, repeats, rates, **backend)
            except BenchmarkError:
                failed.append(variant)
                continue
            add_rates(rows, rates, cycle)
            yield rows
        if failed:
            raise BenchmarkError(f"failed, see above: {', '.join(failed)}")

    return "step", config | {"rates": rates, "cycle": cycle}, batches()
