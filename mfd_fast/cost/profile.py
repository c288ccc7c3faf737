"""A few cycles of a distiller under PyTorch's profiler: seconds by phase and family, waits, memory.

Phases are timed without the profiler first, for it slows every operator down; what an operator's
share of a phase is, comes from the profiler, whose trace has everything on a time line.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mfd_fast.backbones.swap import BlockSwap
from mfd_fast.cost.operators import family_of
from mfd_fast.cost.table import aligned
from mfd_fast.cost.trace import Trace
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.phases import PREFIX, PhaseTimer

# What the host calls to wait for the device, and the operator that reads a value of it.
WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "aten::_local_scalar_dense",
)
OUTSIDE = "between operators"
OPTIMIZER = ("_fused_adamw_", "_fused_adam_", "_foreach_mul_", "_foreach_norm", "_foreach_zero_")


class Copied(NamedTuple):
    """Bytes of blocks that came from the host, and copies that nobody had asked for ahead."""

    bytes: float
    late: float

    @staticmethod
    def of(swap: BlockSwap | None) -> "Copied":
        """Until now."""
        return Copied(0, 0) if swap is None else Copied(swap.moved, swap.missed)


@dataclass(frozen=True)
class Profile:
    """One cycle.

    phases: mean seconds, without the profiler.
    families: phase -> family -> seconds under the profiler; ``OUTSIDE`` is when nothing ran.
    operators: name -> (calls, seconds), the slowest first.
    waits: name -> times the host waited for the device.
    memory: phase -> most bytes alive that were made in the cycle.
    copied: blocks of the base that came from the host.
    """

    phases: dict[str, float]
    families: dict[str, dict[str, float]]
    operators: dict[str, tuple[int, float]]
    waits: dict[str, int]
    memory: dict[str, int]
    copied: Copied


def profile_cycles(
    distiller: Distiller, next_cond: Callable[[int], Any], trace: Path, *, cycles: int = 3
) -> Profile:
    """Run one cycle to warm up, ``cycles`` timed ones, one under the profiler, one for the memory.

    Args:
        next_cond: n -> the condition of update number n.
        trace: where the Chrome trace of the profiled cycle goes.

    The distiller is listened to meanwhile and left as it was.  ``ValueError`` for cycles below 1.
    """
    if cycles < 1:
        raise ValueError(f"the number of cycles must be >= 1, got {cycles}")
    outer, device = distiller.phase, distiller.backbone.device
    swap = getattr(distiller.backbone, "swap", None)
    is_cuda = device.type == "cuda"

    def run(num: int = 1) -> None:
        for _ in range(num * distiller.cycle_length):
            distiller.step(next_cond(sum(distiller.num_updates.values())))

    try:
        run()
        timer, profiled, memory = PhaseTimer(device), PhaseTimer(device), Trace(counts_work=False)
        distiller.phase = timer.phase
        before = Copied.of(swap)
        run(cycles)
        after = Copied.of(swap)
        phases = timer.per_cycle(cycles)
        distiller.phase = profiled.phase
        kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=kinds[: 1 + is_cuda], profile_memory=True) as profiler:
            run()
            slowed = profiled.per_cycle(1)  # waits, so that all kernels are in the trace
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        distiller.phase = memory.phase
        with memory:
            run()
    finally:
        distiller.phase = outer
    events = profiler.events()
    operators = {
        entry.key: (entry.count, _own_seconds(entry, is_cuda))
        for entry in profiler.key_averages()
        if "::" in entry.key
    }
    return Profile(
        phases=phases,
        families=_families(events, slowed, is_cuda),
        operators=dict(sorted(operators.items(), key=lambda entry: -entry[1][1])),
        waits=dict(Counter(event.name for event in events if event.name in WAITS)),
        memory=dict(memory.memory.peak),
        copied=Copied(*((b - a) / cycles for a, b in zip(before, after, strict=True))),
    )


def _own_seconds(event: Any, is_cuda: bool) -> float:
    """Of the operator itself, not of those it calls."""
    return (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e6


def _families(events: Any, seconds: dict[str, float], is_cuda: bool) -> dict[str, dict[str, float]]:
    """Operators belong to the phase that was open on the host when they were called."""
    of_host = [event for event in events if event.device_type == DeviceType.CPU]
    spans = [event for event in of_host if event.name.startswith(PREFIX)]
    parts = {phase: Counter({OUTSIDE: whole}) for phase, whole in seconds.items()}
    for event in of_host:
        began = event.time_range.start
        inside = (s for s in spans if s.time_range.start <= began <= s.time_range.end)
        if "::" in event.name and (span := next(inside, None)) is not None:
            own, part = _own_seconds(event, is_cuda), parts[span.name.removeprefix(PREFIX)]
            part[family(event.name)] += own
            part[OUTSIDE] = max(0.0, part[OUTSIDE] - own)
    return {phase: dict(part) for phase, part in parts.items()}


def family(name: str) -> str:
    """The family of an operator as the profiler names it, ``aten::mm``."""
    name = name.split("::")[-1].removeprefix("mkldnn_")
    return "optimizer" if name in OPTIMIZER else family_of(name)


def summary(result: Profile, rows: int = 12) -> str:
    """What ``mfd-fast profile`` prints."""
    families: Counter = Counter()
    for part in result.families.values():
        families.update(part)
    slowest = [
        [name, str(calls), f"{seconds * 1e3:.2f}"]
        for name, (calls, seconds) in list(result.operators.items())[:rows]
    ]
    waits = ", ".join(f"{name} {count}" for name, count in result.waits.items()) or "none"
    parts = [
        _shares("phase", result.phases),
        "under the profiler, which slows operators down:",
        _shares("family", dict(families.most_common())),
        aligned(["operator", "calls", "ms"], slowest),
        f"waits of the host for the device: {waits}\n"
        f"most memory alive of what the cycle made: {max(result.memory.values()) / 1e6:.1f} MB",
    ]
    if (copied := result.copied).bytes:
        each = f"{copied.bytes / 1e6:.1f} MB a cycle, {copied.late:g} copies late"
        parts.append(f"copied from the host: {each}")
    return "\n\n".join(parts)


def _shares(what: str, seconds: dict[str, float]) -> str:
    whole = sum(seconds.values())
    rows = [[name, f"{s * 1e3:.2f}", f"{s / whole:.1%}"] for name, s in seconds.items()]
    return aligned([what, "ms", "share"], [*rows, ["cycle", f"{whole * 1e3:.2f}", "100.0%"]])
