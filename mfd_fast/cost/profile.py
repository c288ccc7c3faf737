"""A few cycles of a distiller under the profiler: seconds by phase and family, gaps, waits.

Phases are timed without the profiler first, for it slows every operator down; what an operator's
share of a phase is, comes from the profiler.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mfd_fast.cost.operators import family_of
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


@dataclass(frozen=True)
class Profile:
    """One cycle.

    phases: mean seconds, without the profiler.
    families: phase -> family -> seconds under the profiler; ``OUTSIDE`` is what is no operator's.
    operators: name -> (calls, seconds), the slowest first.
    waits: name -> times the host waited for the device.
    gaps: seconds between two kernels, in order; between two operators on the CPU.
    memory: (phase, bytes alive that were made in the cycle) after every operator.
    """

    device: str
    phases: dict[str, float]
    families: dict[str, dict[str, float]]
    operators: dict[str, tuple[int, float]]
    waits: dict[str, int]
    gaps: list[float]
    memory: list[tuple[str, int]]


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
    run = _Runner(distiller, next_cond)
    try:
        run.cycle()
        timer = PhaseTimer(device)
        distiller.phase = timer.phase
        for _ in range(cycles):
            run.cycle()
        phases = timer.per_cycle(cycles)
        timer = PhaseTimer(device)
        distiller.phase = timer.phase
        with profile(activities=_activities(device)) as profiler:
            run.cycle()
            timer.seconds()  # waits, so that all kernels are in the trace
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        memory = _memory_timeline(run)
    finally:
        distiller.phase = outer
    events = profiler.events()
    return Profile(
        device=str(device),
        phases=phases,
        families=_families(events, device.type == "cuda"),
        operators=_operators(events, device.type == "cuda"),
        waits=dict(Counter(event.name for event in events if event.name in WAITS)),
        gaps=_gaps(events, device.type == "cuda"),
        memory=memory,
    )


class _Runner:
    """Cycles of a distiller, one after the other."""

    def __init__(self, distiller: Distiller, next_cond: Callable[[int], Any]):
        self.distiller, self.next_cond = distiller, next_cond

    def cycle(self) -> None:
        for _ in range(self.distiller.cycle_length):
            self.distiller.step(self.next_cond(sum(self.distiller.num_updates.values())))


def _activities(device: torch.device) -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *cuda]


def _memory_timeline(run: _Runner) -> list[tuple[str, int]]:
    with _Timeline() as timeline:
        run.distiller.phase = timeline.phase
        run.cycle()
    return timeline.points


class _Timeline(Trace):
    """A trace that remembers the bytes alive after every operator."""

    def __init__(self):
        super().__init__(counts_work=False)
        self.points: list[tuple[str, int]] = []

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__torch_dispatch__(*args, **kwargs)
        self.points.append((self.current, self.memory.live))
        return out


def _is_operator(event: Any) -> bool:
    return "::" in event.name and event.device_type == torch.autograd.DeviceType.CPU


def _own_seconds(event: Any, is_cuda: bool) -> float:
    """Of the operator itself, not of those it calls."""
    microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
    return microseconds / 1e6


def _families(events: Any, is_cuda: bool) -> dict[str, dict[str, float]]:
    """Operators belong to the phase that was open on the host when they were called."""
    ranges = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix(PREFIX))
        for e in events
        if e.name.startswith(PREFIX) and e.device_type == torch.autograd.DeviceType.CPU
    )
    parts: dict[str, Counter] = defaultdict(Counter)
    for begin, end, phase in ranges:
        parts[phase][OUTSIDE] += 0.0 if is_cuda else (end - begin) / 1e6
    for event in filter(_is_operator, events):
        phase = _phase_at(ranges, event.time_range.start)
        if phase is not None:
            seconds = _own_seconds(event, is_cuda)
            parts[phase][family(event.name)] += seconds
            parts[phase][OUTSIDE] -= 0.0 if is_cuda else seconds
    return {phase: {k: max(v, 0.0) for k, v in part.items()} for phase, part in parts.items()}


def _phase_at(ranges: list[tuple[float, float, str]], moment: float) -> str | None:
    inside = [phase for begin, end, phase in ranges if begin <= moment <= end]
    return inside[0] if inside else None


def family(name: str) -> str:
    """The family of an operator as the profiler names it, ``aten::mm``."""
    name = name.split("::")[-1].removeprefix("mkldnn_")
    return "optimizer" if name in OPTIMIZER else family_of(name)


def _operators(events: Any, is_cuda: bool) -> dict[str, tuple[int, float]]:
    seconds: Counter = Counter()
    calls: Counter = Counter()
    for event in filter(_is_operator, events):
        seconds[event.name] += _own_seconds(event, is_cuda)
        calls[event.name] += 1
    return {name: (calls[name], total) for name, total in seconds.most_common()}


def _gaps(events: Any, is_cuda: bool) -> list[float]:
    """Time in which no kernel (on the CPU: no operator) ran between two that did."""
    wanted = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == wanted and (is_cuda or "::" in e.name)
    )
    gaps, reached = [], None
    for begin, end in spans:
        if reached is not None and begin > reached:
            gaps.append((begin - reached) / 1e6)
        reached = end if reached is None else max(reached, end)
    return gaps


def summary(result: Profile, rows: int = 12) -> str:
    """What ``mfd-fast profile`` prints."""
    from mfd_fast.cost.table import aligned

    total = sum(result.phases.values())
    phases = [[name, f"{s * 1e3:.2f}", f"{s / total:.1%}"] for name, s in result.phases.items()]
    phases.append(["cycle", f"{total * 1e3:.2f}", "100.0%"])
    families: Counter = Counter()
    for part in result.families.values():
        families.update(part)
    whole = sum(families.values())
    shares = [[name, f"{s * 1e3:.2f}", f"{s / whole:.1%}"] for name, s in families.most_common()]
    slowest = [
        [name, str(calls), f"{seconds * 1e3:.2f}"]
        for name, (calls, seconds) in list(result.operators.items())[:rows]
    ]
    gaps = result.gaps or [0.0]
    peak = max(size for _, size in result.memory)
    waits = ", ".join(f"{name} {count}" for name, count in result.waits.items()) or "none"
    return "\n\n".join(
        [
            aligned(["phase", "ms", "share"], phases),
            "under the profiler, which slows operators down:\n"
            + aligned(["family", "ms", "share"], shares),
            aligned(["operator", "calls", "ms"], slowest),
            f"gaps: {len(result.gaps)}, together {sum(gaps) * 1e3:.2f} ms, "
            f"mean {mean(gaps) * 1e6:.1f} us, longest {max(gaps) * 1e6:.0f} us\n"
            f"waits of the host for the device: {waits}\n"
            f"most memory alive of what the cycle made: {peak / 1e6:.1f} MB",
        ]
    )
