"""Timing: which implementation of an operator takes how long, on inputs it has not just seen.

On CUDA every implementation is captured into a graph that walks through as many copies of its
inputs as it takes to read more than twice the L2, and that writes no output buffer twice; a replay
is one sample, and its time per call is reported.  That is the device's time without the host's
launch gaps, as the distillation step runs it.  What cannot be captured ends the benchmark, and the
cases before it are kept.  On the CPU the implementations take turns, one call each, on the same
inputs.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import signature
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.running import BenchmarkError, Options, spread
from mfd_fast.cost.devices import copy_bandwidth
from mfd_fast.testing.numerics import assert_as_accurate

# CUDA: replays that are timed, and the least number of calls in one, so that its launch is shared.
REPLAYS = 50
MIN_CALLS = 10
# One SANA latent in bf16 reads and writes 260 kB: 512 calls move 134 MB, an H100's L2 holds 50.
MAX_COPIES = 512
# Seconds of warm-up and, on the CPU, of measuring, for one implementation of one case.
WARMUP_S = 0.2
CPU_SECONDS = 0.5
SMOKE_COPY_BYTES = 1 << 20

# Elements of a sample: SANA 32 channels x 32 x 32; OccFM 12 frames x 16 x 50 x 50.
SANA_ELEMENTS, OCCFM_ELEMENTS = 32 * 32 * 32, 12 * 16 * 50 * 50
# (name, batch, elements of a sample)
LATENTS = [(f"sana-1024 x{batch}", batch, SANA_ELEMENTS) for batch in (1, 3, 12)]
LATENTS += [("occfm x8", 8, OCCFM_ELEMENTS)]

Implementations = dict[str, Callable[..., object]]


@dataclass(frozen=True)
class Case:
    """One shape and dtype of an operator.

    ``inputs`` makes fresh positional arguments, and the gradient of the result after them where the
    operator is trained; ``bytes_moved`` is the traffic that the operator's docstring counts, once.
    """

    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple]
    bytes_moved: int
    flops: int = 0
    train: bool = False


@dataclass(frozen=True)
class Operator:
    """What ``bench/ops/NAME.py`` declares.

    cases: of a device, all or the small ones.
    eager: as one would write it in PyTorch; it is compiled too.
    exact: run in float64 to verify the others by the tolerance rule; ``eager`` if None.  Without
        ``has_exact`` they must be finite and shaped like eager's.  What writes in place returns it.
    trained: arguments whose gradients a training case takes.
    device_call: ``(kernel, *inputs)``: how the Triton and the compiled CUDA implementation, called
        ``kernel`` (the operator's name if left out), are timed beside the one that is chosen.
    others: further implementations, forward only.
    """

    cases: Callable[[str, bool], Iterator[Case]]
    eager: Callable[..., object]
    ours: Callable[..., object]
    exact: Callable[..., object] | None = None
    has_exact: bool = True
    trained: tuple[str, ...] = ()
    suffix: str = " train"
    kernel: str = ""
    device_call: Callable[..., object] | None = None
    others: Implementations = field(default_factory=dict)

    def implementations(self, name: str, case: Case, options: Options) -> Implementations:
        """Name -> what is timed; "eager" first."""
        found: Implementations = {"eager": self.eager}
        found |= {} if case.train else self.others
        if options.with_compile and not options.smoke:
            found["compile"] = torch.compile(self.eager, dynamic=False)
        found["ours"] = self.ours
        if options.device == "cuda" and self.device_call is not None:
            kernel = self.kernel or name
            triton = getattr(import_module(f"mfd_fast.kernels.{name}"), kernel)
            found["ours-triton"] = partial(self.device_call, triton)
            if cuda := compiled_cuda(kernel):
                found["ours-cuda"] = partial(self.device_call, cuda)
        return {key: self._run(run, case) for key, run in found.items()}

    def name_of(self, case: Case) -> dict[str, str]:
        """The columns that name a case."""
        shape = case.shape + self.suffix * case.train
        return {"shape": shape, "dtype": str(case.dtype).removeprefix("torch.")}

    def exact_of(self, case: Case) -> Callable[..., object] | None:
        """What the implementations of a case are held to."""
        return self._run(self.exact or self.eager, case) if self.has_exact else None

    def inputs(self, case: Case) -> tuple:
        """Fresh arguments of an implementation."""
        made = case.inputs()
        if not self.trained:
            return made
        if not case.train:
            return made[:-1]
        pairs = zip(signature(self.eager).parameters, made[:-1], strict=True)
        wants = self.trained
        return *(x.detach().requires_grad_() if arg in wants else x for arg, x in pairs), made[-1]

    def _run(self, run: Callable[..., object], case: Case) -> Callable[..., object]:
        return partial(gradients, run) if case.train else run


def gradients(forward: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    """Those of the inputs that want one; the last input is the gradient of the result."""
    *inputs, grad = inputs
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(forward(*inputs), leaves, grad)


def compiled_cuda(name: str) -> Callable[..., object] | None:
    """The compiled CUDA operator ``_<name>_cuda``, or None if the extension has none."""
    operator = getattr(torch.ops.mfd_fast, f"_{name.lstrip('_')}_cuda", None)
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


def verify(
    impls: Implementations,
    inputs: Callable[[], tuple],
    exact: Callable[..., object] | None,
    where: str,
) -> None:
    """``AssertionError`` that names the implementation, unless all agree with "eager"."""
    eager, wide = _tensors(impls["eager"](*_seeded(inputs))), None
    if exact is not None:
        wide = _tensors(exact(*tree_map_only(Tensor, _widen, _seeded(inputs))))
        assert len(wide) == len(eager), f"exact gives {len(wide)} tensors, eager {len(eager)}"
    for name, fn in impls.items():
        ours = _tensors(fn(*_seeded(inputs)))
        assert len(ours) == len(eager), f"{name} at {where}: {len(ours)} tensors, not {len(eager)}"
        for i, (actual, expected) in enumerate(zip(ours, eager, strict=True)):
            try:
                assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
                assert torch.isfinite(actual).all(), "not finite"
                if wide is not None:
                    assert_as_accurate(actual, expected, wide[i])
            except AssertionError as error:
                raise AssertionError(f"{name} at {where}: output {i}: {error}") from None


def measure(
    impls: Implementations, inputs: Callable[[], tuple], device: str, share: float = 1.0
) -> dict[str, tuple[list[float], str]]:
    """Microseconds per call of every implementation, and how taken ("graph", "cpu").

    ``share`` of the time that a measurement takes.
    """
    if torch.device(device).type == "cpu":
        return {name: (us, "cpu") for name, us in _measure_cpu(impls, inputs(), share).items()}
    copies = _cold_copies(inputs)
    return {name: (_measure_cuda(fn, copies), "graph") for name, fn in impls.items()}


def _measure_cpu(impls: Implementations, args: tuple, share: float) -> dict[str, list[float]]:
    calls = MIN_CALLS
    for fn in impls.values():
        deadline = time.perf_counter() + share * WARMUP_S
        count = 0
        while count < 2 or time.perf_counter() < deadline:
            fn(*args)
            count += 1
        calls = max(calls, math.ceil(count / WARMUP_S * CPU_SECONDS))
    samples: dict[str, list[float]] = {name: [] for name in impls}
    deadline = time.perf_counter() + share * CPU_SECONDS * len(impls)
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


def rows_of(name: str, operator: Operator, case: Case, options: Options, copy: float) -> list[dict]:
    """Verify, then time every implementation of one case; a row each.

    ``copy``: bytes a second of a large copy.
    """
    torch.compiler.reset()  # else the ninth shape would silently run uncompiled
    impls, inputs = operator.implementations(name, case, options), partial(operator.inputs, case)
    where = operator.name_of(case)
    verify(impls, inputs, operator.exact_of(case), " ".join(where.values()))
    results, rows = measure(impls, inputs, options.device, options.share), []
    for impl, (samples, timing) in results.items():
        seconds = median(samples) * 1e-6
        rate = case.bytes_moved / seconds
        rows.append(
            {
                **where,
                "impl": impl,
                **spread(samples, "us", 1.0, 2),
                "gb_s": round(rate / 1e9, 1),
                "tflop_s": round(case.flops / seconds / 1e12, 4) if case.flops else None,
                "speedup": round(median(results["eager"][0]) * 1e-6 / seconds, 3),
                "copy_fraction": round(rate / copy, 3),
                "bytes_moved": case.bytes_moved,
                "samples": len(samples),
                "timing": timing,
            }
        )
    return rows


def benchmark(options: Options, name: str) -> tuple[str, dict, Iterator[list[dict]]]:
    """The operator that ``bench/ops/NAME.py`` declares."""
    operator: Operator = import_module(f"bench.ops.{name}").OPERATOR
    copy = copy_bandwidth(options.device, SMOKE_COPY_BYTES if options.smoke else 0)
    config = {
        "replays": REPLAYS,
        "min_calls": MIN_CALLS,
        "warmup_s": WARMUP_S,
        "cpu_seconds": CPU_SECONDS,
        "smoke": options.smoke,
        "only": options.only,
        "copy_gb_s": round(copy / 1e9, 1),
    }

    def batches() -> Iterator[list[dict]]:
        wrong = []
        for case in operator.cases(options.device, options.smoke):
            if not options.wants(" ".join(operator.name_of(case).values())):
                continue
            try:
                yield rows_of(name, operator, case, options, copy)
            except AssertionError as error:  # wrong results are not timed; the other cases are
                wrong.append(str(error))
        if wrong:
            raise BenchmarkError("; ".join(wrong))

    return name, config, batches()
