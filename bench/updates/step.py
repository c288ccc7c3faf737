"""Whole updates, one switch at a time, from the literal loop to the whole engine: a waterfall.

    python -m bench.bench_step --model sana-mini --out bench/results/step_sana_mini_cpu.json

    published         the literal loop that also encodes its prompts and writes an image
    literal           diffusers + PEFT, one network call after another (``bench.baseline_eager``)
    literal compiled  the same with its transformer under torch.compile
    sequential        our engine on the network as its authors wrote it, one lane a call
    lane-packed       all lanes of an ODE step in one call
    prepared          our network: conditions prepared once, operators from PyTorch
    fused             the same with the compiled operators
    captured          the same as CUDA graphs; only on a GPU
    cheap, block      less is kept for the backward (``mfd_fast.backbones.activation``)
    batch N           N samples an update
    ab2               a second-order solver with twice the step: half the evaluations
    fp8               products of the lanes without gradient in 8 bits; only on a GPU

Every variant has the same interval and runs in a process of its own: updates of each role that are
not counted, one whose operators are, then the timed ones.  Digits have no other network and no
operators of their own; OccFM's ``sequential`` and ``lane-packed`` are on the network as specified.
Without diffusers and peft SANA's first five are skipped by name.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bench.nvml import Nvml
from bench.record import header, write
from bench.step_loops import (
    INTERVAL,
    MODELS,
    STEP,
    VARIANTS,
    Loop,
    cycle_of,
    make_loop,
    samples_of,
    variants_of,
    working_dtype,
)
from mfd_fast.cost.devices import Device, Efficiency, calibrate, this_machine
from mfd_fast.cost.estimate import phase_seconds
from mfd_fast.cost.profile import WAITS
from mfd_fast.cost.trace import Trace, Work
from mfd_fast.distill.phases import PhaseTimer
from mfd_fast.run.environment import peak_memory, peak_memory_counts

ROOT = Path(__file__).resolve().parents[1]
WARMUP = {"cpu": 1, "cuda": 4}  # updates after the counted one; the fourth captures its graphs
MIN_SECONDS = {"cpu": 0.0, "cuda": 1.0}  # of timed updates: the driver sums energy every 20-100 ms
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
    clock, processor = [], []
    joules = nvml.joules() if nvml else None
    while len(clock) < repeats or sum(clock) < MIN_SECONDS[kind]:
        start, used = time.perf_counter(), time.process_time()
        update()
        if kind == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    if joules is not None:
        joules = (nvml.joules() - joules) / len(clock)
    loop.listened.phase = silent
    seconds, tenths = median(clock), quantiles([*clock, *clock], n=10, method="inclusive")
    return {
        "seconds": round(seconds, 5),
        "seconds_p10": round(tenths[0], 5),
        "seconds_p90": round(tenths[-1], 5),
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
    seconds = phase_seconds(work, device, Efficiency({}, 1.0, 0.0, ""))
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
    """Columns that need more than a row: achieved rate, its share of a product's, cycles an hour.

    ``rows`` are the two roles of one variant; ``rates`` has ``tflops`` of a large product.
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
        "host_us": round(calibrate(here, device).host_seconds * 1e6, 3),
    }


def measure_elsewhere(
    model: str, variant: str, device: str, repeats: int, rates: dict[str, float]
) -> list[dict]:
    """:func:`measure` in a process of its own; ``prepared`` without compiled operators."""
    command = [sys.executable, "-m", "bench.bench_step", "--model", model, "--device", device]
    command += ["--variant", variant, "--repeats", str(repeats), "--rates", json.dumps(rates)]
    backend = {"MFD_FAST_BACKEND": "reference"} if variant == "prepared" else {}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | backend, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return []
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sana-mini")
    parser.add_argument("--variant", choices=VARIANTS, help="this one only, in this process")
    parser.add_argument("--only", default="", help="a regex: only variants that it finds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of a row")
    parser.add_argument("--smoke", action="store_true", help="few variants, one timed update")
    parser.add_argument("--rates", type=json.loads, help=argparse.SUPPRESS)  # of this device
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    repeats = 1 if args.smoke else args.repeats
    rates, cycle = args.rates or rates_here(args.device), cycle_of(args.model)
    if args.variant:
        for row in measure(args.model, args.variant, args.device, repeats, rates):
            print(json.dumps(row), flush=True)
        return 0
    config = {"model": args.model, "interval": INTERVAL, "step": STEP, "repeats": repeats}
    config |= {"peak_mb": peak_memory_counts(args.device), "nvml_mb": NVML_COUNTS}
    head = header("step", args.device, config | {"rates": rates, "cycle": cycle})
    only = args.only or (SMOKE if args.smoke else "")
    rows: list[dict] = []
    failed = []
    for variant in variants_of(args.model, args.device):
        if not re.search(only, variant):
            continue
        new = measure_elsewhere(args.model, variant, args.device, repeats, rates)
        if not new:
            failed.append(variant)
            continue
        add_rates(new, rates, cycle)
        rows += new
        print(*(_line(row) for row in new), sep="\n", flush=True)
        if args.out:  # after every variant: a run that is cut off keeps what it has
            write(args.out, head, rows)
    if failed:
        print(f"failed, see above: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed) or not rows)


def _line(row: dict) -> str:
    phases = ", ".join(f"{name} {part['seconds']:.4f}" for name, part in row["phases"].items())
    return (
        f"{row['variant']:<17}{row['update']:<8}{row['batch']:>4} {row['seconds']:>9.4f} s "
        f"{row['product_share']:>6.1%} of a product  {row['operators']:>6} operators "
        f"{row['peak_mb']:>8.0f} MB  ({phases})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
