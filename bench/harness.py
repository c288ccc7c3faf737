"""Timing: which implementation of an operator takes how long, on inputs it has not just seen.

On CUDA every implementation is captured into a graph that walks through as many copies of its
inputs as it takes to read more than twice the L2, and that writes no output buffer twice; a replay
is one sample, and its time per call is reported.  That is the device's time without the host's
launch gaps, as the distillation step runs it.  What cannot be captured ends the benchmark, and the
cases before it are kept.  On the CPU the implementations take turns, one call each, on the same
inputs.

    python -m bench.bench_interpolate --out bench/results/interpolate_h100.json
    python -m bench.bench_interpolate --smoke       # any machine: runs the code, checks the numbers
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.record import header, table, write
from mfd_fast.testing.numerics import assert_as_accurate

# CUDA: replays that are timed, and the least number of calls in one, so that its launch is shared.
REPLAYS = 50
MIN_CALLS = 10
# One SANA latent in bf16 reads and writes 260 kB: 512 calls move 134 MB, an H100's L2 holds 50.
MAX_COPIES = 512
# Seconds of warm-up and, on the CPU, of measuring, for one implementation of one case.
WARMUP_S = 0.2
CPU_SECONDS = 0.5
COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """One shape and dtype of an operator.

    ``inputs`` makes fresh positional arguments of every implementation; ``bytes_moved`` is the
    traffic that the operator's docstring counts, once.  ``exact`` is run on the inputs in float64
    to verify the implementations by the tolerance rule; without it they must be finite and shaped
    like eager's.  An operator that writes in place returns what it wrote.
    """

    shape: str
    dtype: str
    impls: dict[str, Callable[..., object]]
    inputs: Callable[[], tuple]
    bytes_moved: int
    flops: int = 0
    exact: Callable[..., object] | None = None


def compiled_cuda(name: str) -> Callable[..., object] | None:
    """The compiled CUDA operator ``_<name>_cuda``, or None if the extension has none."""
    private = f"_{name.lstrip('_')}_cuda"
    operator = getattr(torch.ops.mfd_fast, private, None)
    if operator is None or not operator.default.has_kernel_for_dispatch_key("CUDA"):
        return None
    return operator


def _seeded(inputs: Callable[[], tuple]) -> tuple:
    torch.manual_seed(0)
    return inputs()


def _tensors(result: object) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _widen(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def verify(case: Case) -> None:
    """``AssertionError`` that names the implementation, unless all agree with "eager"."""
    eager = _tensors(case.impls["eager"](*_seeded(case.inputs)))
    exact = None
    if case.exact is not None:
        exact = _tensors(case.exact(*tree_map_only(Tensor, _widen, _seeded(case.inputs))))
        assert len(exact) == len(eager), f"exact gives {len(exact)} tensors, eager {len(eager)}"
    for name, fn in case.impls.items():
        where = f"{name} at {case.shape} {case.dtype}"
        ours = _tensors(fn(*_seeded(case.inputs)))
        assert len(ours) == len(eager), f"{where}: {len(ours)} tensors, eager gives {len(eager)}"
        for i, (actual, expected) in enumerate(zip(ours, eager, strict=True)):
            assert actual.shape == expected.shape, (
                f"{where}: {actual.shape} is not {expected.shape}"
            )
            assert torch.isfinite(actual).all(), f"{where}: output {i} is not finite"
            if exact is None:
                continue
            try:
                assert_as_accurate(actual, expected, exact[i])
            except AssertionError as error:
                raise AssertionError(f"{where}: output {i}: {error}") from None


def measure(
    impls: dict[str, Callable[..., object]], inputs: Callable[[], tuple], device: str
) -> dict[str, tuple[list[float], str]]:
    """Microseconds per call of every implementation, and how taken ("graph", "cpu")."""
    if torch.device(device).type == "cpu":
        return {name: (us, "cpu") for name, us in _measure_cpu(impls, inputs()).items()}
    copies = _cold_copies(inputs)
    return {name: (_measure_cuda(fn, copies), "graph") for name, fn in impls.items()}


def _measure_cpu(impls: dict[str, Callable[..., object]], args: tuple) -> dict[str, list[float]]:
    calls = MIN_CALLS
    for fn in impls.values():
        deadline = time.perf_counter() + WARMUP_S
        count = 0
        while count < 2 or time.perf_counter() < deadline:
            fn(*args)
            count += 1
        calls = max(calls, math.ceil(count / WARMUP_S * CPU_SECONDS))
    samples: dict[str, list[float]] = {name: [] for name in impls}
    deadline = time.perf_counter() + CPU_SECONDS * len(impls)
    while len(samples["eager"]) < MIN_CALLS or (
        len(samples["eager"]) < calls and time.perf_counter() < deadline
    ):
        for name, fn in impls.items():
            start = time.perf_counter()
            fn(*args)
            samples[name].append((time.perf_counter() - start) * 1e6)
    return samples


def _cold_copies(inputs: Callable[[], tuple]) -> list[tuple]:
    """As many argument tuples as it takes to read more than twice the L2, at most MAX_COPIES."""
    first = inputs()
    size = sum(leaf.nbytes for leaf in tree_leaves(first) if isinstance(leaf, Tensor))
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    copies = min(MAX_COPIES, 1 + math.ceil(2 * l2 / max(size, 1)))
    return [first] + [inputs() for _ in range(copies - 1)]


def _measure_cuda(fn: Callable[..., object], copies: list[tuple]) -> list[float]:
    """Raises what the capture raises: after that nothing in this process can be captured."""
    calls = max(len(copies), MIN_CALLS)
    args = [copies[i % len(copies)] for i in range(calls)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        deadline = time.perf_counter() + WARMUP_S
        while time.perf_counter() < deadline:
            for one in args:
                fn(*one)
            torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [fn(*one) for one in args]  # alive together: no output buffer is written twice
    samples = [us / calls for us in _replay_times(graph.replay)]
    del held, graph
    torch.cuda.empty_cache()
    return samples


def _replay_times(replay: Callable[[], object]) -> list[float]:
    for _ in range(3):
        replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for begin, end in events:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in events]


def copy_bandwidth(device: str, num_bytes: int = COPY_BYTES) -> float:
    """Bytes per second of ``torch.Tensor.copy_`` on this device, reads and writes counted."""

    def buffers() -> tuple[Tensor, Tensor]:
        source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        return source, torch.zeros_like(source)

    samples, _ = measure({"eager": lambda src, dst: dst.copy_(src)}, buffers, device)["eager"]
    return 2 * num_bytes / (median(samples) * 1e-6)


def _row(
    case: Case, impl: str, samples: list[float], timing: str, eager_us: float, copy: float
) -> dict:
    mid = median(samples)
    tenths = quantiles(samples, n=10) if len(samples) > 1 else [mid] * 9
    bandwidth = case.bytes_moved / (mid * 1e-6)
    return {
        "shape": case.shape,
        "dtype": case.dtype,
        "impl": impl,
        "us": round(mid, 2),
        "us_p10": round(tenths[0], 2),
        "us_p90": round(tenths[-1], 2),
        "gb_s": round(bandwidth / 1e9, 1),
        "tflop_s": round(case.flops / (mid * 1e-6) / 1e12, 2) if case.flops else None,
        "speedup": round(eager_us / mid, 3),
        "copy_fraction": round(bandwidth / copy, 3),
        "bytes_moved": case.bytes_moved,
        "samples": len(samples),
        "timing": timing,
    }


def run_case(case: Case, device: str, copy: float) -> list[dict]:
    """Verify, then time every implementation of one case; one row each."""
    torch.compiler.reset()  # else the ninth shape would silently run uncompiled
    verify(case)
    results = measure(case.impls, case.inputs, device)
    eager_us = median(results["eager"][0])
    return [_row(case, name, us, how, eager_us, copy) for name, (us, how) in results.items()]


def _keep(case: Case, with_compile: bool) -> Case:
    impls = {k: v for k, v in case.impls.items() if with_compile or not k.startswith("compile")}
    return Case(**{**vars(case), "impls": impls})


def main(
    op: str, cases: Callable[[str, bool], Iterator[Case]], argv: list[str] | None = None
) -> int:
    """The command line of every benchmark file; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.bench_{op}", description=f"Times {op}.")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--smoke", action="store_true", help="small shapes, no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--only", default="", help="a regex: only cases whose 'shape dtype' it finds"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    copy = copy_bandwidth(args.device, (1 << 20) if args.smoke else COPY_BYTES)
    config = {
        "replays": REPLAYS,
        "min_calls": MIN_CALLS,
        "warmup_s": WARMUP_S,
        "cpu_seconds": CPU_SECONDS,
        "smoke": args.smoke,
        "only": args.only,
        "copy_gb_s": round(copy / 1e9, 1),
    }
    head = header(op, args.device, config)
    rows: list[dict] = []
    status = 0
    for case in cases(args.device, args.smoke):
        if not re.search(args.only, f"{case.shape} {case.dtype}"):
            continue
        with_compile = not (args.smoke or args.no_compile)
        try:
            new = run_case(_keep(case, with_compile), args.device, copy)
        except AssertionError as error:  # wrong numbers are not timed; the other cases are
            print(f"WRONG: {error}", flush=True)
            status = 1
            continue
        print(table(new, with_header=not rows), flush=True)
        rows += new
        if args.out:  # after every case: a run that is cut off keeps what it has
            write(args.out, head, rows)
    return status
