"""Time, memory, energy and communication of a run on a device, from what a cycle does.

    seconds of an operator = max(operations / rate, bytes / bandwidth), each rate times its share
    device of a phase      = sum over its operators
    host of a phase        = operators x launch, which others measured as a range
    seconds of a phase     = max(host, device): launches are queued while the device works
    where it was measured  = sum over its operators / share + operators x host (``cost.measured``)

Not counted: text encoding, decoding of images, evaluation, reading data.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from mfd_fast.backbones.activation import POLICIES
from mfd_fast.cost.cycle import (
    INTEGRATE,
    CycleCost,
    is_interval,
    moment_bytes,
    trace_cycle,
    weighted_cycles,
)
from mfd_fast.cost.devices import COMPILED, EAGER, REPLAYED, Device, Efficiency
from mfd_fast.cost.shapes import terms_of
from mfd_fast.cost.trace import Work
from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import run_is_captured, why_eager

CONTEXT_BYTES = 0.6e9  # CUDA context and libraries; assumed, not measured on a GPU
GPUS_PER_MACHINE = 8
NETWORK_BYTES_S = 50e9  # 400 Gbit/s a GPU between machines; assumed
MESSAGE_SECONDS = 20e-6  # of one step of an all-reduce; assumed
OPTIMIZERS = ("adamw", "adamw8bit")
# How another way to launch is asked for.
WAYS = {
    EAGER.how: "--train.capture off",
    COMPILED.how: "blocks under torch.compile (no setting)",
    REPLAYED.how: "--train.capture on",
}


class Span(NamedTuple):
    """At least and at most, in seconds or in hours."""

    low: float
    high: float

    def times(self, factor: float, more: float = 0.0) -> "Span":
        """Both times ``factor``, plus ``more``."""
        return Span(self.low * factor + more, self.high * factor + more)


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase: what launching it takes the host, and the work the device.

    is_sum: they follow each other, as in what was measured of a CPU.
    """

    host: Span
    device: float
    is_sum: bool = False

    @property
    def seconds(self) -> Span:
        """Of both together."""
        if self.is_sum:
            return self.host.times(1.0, self.device)
        return Span(max(self.host.low, self.device), max(self.host.high, self.device))

    @property
    def bound(self) -> str:
        """Which of the two decides: "host", "device", or "either" where the range has both."""
        if self.host.low > self.device:
            return "host"
        return "device" if self.host.high <= self.device else "either"


def total(phases: Iterable[Phase]) -> Span:
    """Seconds of phases one after the other."""
    spans = [phase.seconds for phase in phases]
    return Span(sum(span.low for span in spans), sum(span.high for span in spans))


@dataclass(frozen=True)
class Choice:
    """The same cycle another way: what a sample takes, and the memory."""

    how: str
    seconds: Span
    bytes: float


@dataclass(frozen=True)
class Profile:
    """A choice between speed and memory, with what it costs."""

    activation: str
    optimizer: str
    batch: int
    seconds: Span
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """A run of ``config`` on ``gpus`` devices, ``cycle.batch`` samples an update on each.

    phases: seconds of one cycle by phase; memory: bytes by component on one device.
    choices: what launching in another way, or a doubled batch, would bring; none where it was
        measured, or on a CPU.
    largest_batch: the most samples an update that fit; 0 if one does not.
    cheapest: the fastest of the profiles that fit at this batch, or None; smallest: the one that
    needs least.
    """

    config: RunConfig
    device: Device
    efficiency: Efficiency
    gpus: int
    cycle: CycleCost
    phases: dict[str, Phase]
    memory: dict[str, float]
    choices: tuple[Choice, ...]
    largest_batch: int
    cheapest: Profile | None
    smallest: Profile

    @property
    def cycle_seconds(self) -> Span:
        """One cycle without communication."""
        return total(self.phases.values())

    @property
    def cycles(self) -> float:
        """Cycles of the whole run."""
        return self.config.train.updates / self.config.distill.student_updates

    @property
    def seconds(self) -> Span:
        """Of the whole run, communication included."""
        return self.cycle_seconds.times(self.cycles, self.cycles * self.communication(self.gpus))

    @property
    def kilowatt_hours(self) -> float:
        """At the power limit all the time: an upper bound."""
        return self.seconds.high / 3600 * self.gpus * self.device.watts / 1000

    def communication(self, gpus: int) -> float:
        """Seconds of a cycle that sum gradients over ``gpus`` devices, nothing hidden behind work.

        A ring moves 2 (n - 1) / n of the bytes through every link, in 2 log2(n) messages.
        """
        if gpus == 1:
            return 0.0
        inside = self.device.link or NETWORK_BYTES_S
        link = inside if gpus <= GPUS_PER_MACHINE else min(inside, NETWORK_BYTES_S)
        distill = self.config.distill
        updates = {"aux": distill.aux_updates, "student": distill.student_updates}
        messages = 2 * math.ceil(math.log2(gpus))
        return sum(
            updates[role] * (2 * (gpus - 1) / gpus * size / link + messages * MESSAGE_SECONDS)
            for role, size in self.cycle.gradients.items()
        )


def estimate(
    config: RunConfig, device: Device, efficiency: Efficiency, *, gpus: int = 1
) -> Estimate:
    """Predict the run of ``config``.

    ``ValueError`` if ``gpus`` is below 1, or above for an objective that trains in one process, or
    if the batch does not divide into the micro-batches.
    """
    if gpus < 1:
        raise ValueError(f"the number of GPUs must be >= 1, got {gpus}")
    if gpus > 1 and not is_interval(config.distill):
        raise ValueError(
            f"distill.objective={config.distill.objective!r} trains in one process: drop --gpus"
        )
    batch = config.train.batch_size
    cycles = cycles_of(config)
    cycle = cycles[config.train.activation]
    # Twice the micro-batches is half the rows at a time, so the double batch must double the rows.
    double = cycle_of(config, 2 * batch)
    is_captured = run_is_captured(config, "cuda" if device.is_gpu else "cpu")
    size = partial(memory_of, is_captured=is_captured, has_context=device.is_gpu)
    here, twice = size(cycle), size(double)
    profiles = profiles_of(cycles, device, efficiency, is_captured=is_captured)
    return Estimate(
        config=config,
        device=device,
        efficiency=efficiency,
        gpus=gpus,
        cycle=cycle,
        phases=cycle_phases(cycle, device, efficiency),
        memory=here,
        choices=_choices(config, cycle, double, device, efficiency),
        largest_batch=_largest_batch(device.memory, here, twice, batch),
        cheapest=next((p for p in profiles if p.bytes <= device.memory), None),
        smallest=min(profiles, key=lambda p: p.bytes),
    )


def cycle_phases(cycle: CycleCost, device: Device, efficiency: Efficiency) -> dict[str, Phase]:
    """phase -> seconds of a cycle."""
    return {name: phase_of(work, device, efficiency, name) for name, work in cycle.phases.items()}


def phase_of(work: Work, device: Device, efficiency: Efficiency, name: str = "") -> Phase:
    """Seconds of a phase's work."""
    working = 0.0
    for op, count in work.calls.items():
        share = efficiency.shares.get(op.family, efficiency.bandwidth)
        compute = op.flops / (device.flops(op.dtype) * share)
        working += count * max(compute, op.bytes / (device.bandwidth * efficiency.bandwidth))
    fit = efficiency.fit_of(name)
    if fit is None:
        host = Span(efficiency.host.low, efficiency.host.high)
        return Phase(host.times(work.num_ops), working)
    launching = work.num_ops * fit.host_seconds
    return Phase(Span(launching, launching), working / fit.share, is_sum=True)


def _choices(
    config: RunConfig, cycle: CycleCost, double: CycleCost, device: Device, used: Efficiency
) -> tuple[Choice, ...]:
    """Every way to launch, where what it costs is assumed, and twice the batch."""
    if used.phases or not device.is_gpu:
        return ()
    can_capture = not why_eager(config.distill, "cuda", is_sharded=config.train.shard == "fsdp")
    ways = [
        (WAYS[host.how], cycle, replace(used, host=host))
        for host in used.hosts
        if host != used.host and (can_capture or host.how != REPLAYED.how)
    ]
    return tuple(
        Choice(
            name,
            total(cycle_phases(cost, device, way).values()).times(1 / cost.batch),
            sum(_memory(cost, way).values()),
        )
        for name, cost, way in [*ways, (f"batch {double.batch}", double, used)]
    )


def _memory(cycle: CycleCost, way: Efficiency) -> dict[str, float]:
    return memory_of(cycle, is_captured=way.host.how == REPLAYED.how, has_context=True)


def memory_of(cycle: CycleCost, *, is_captured: bool, has_context: bool) -> dict[str, float]:
    """Bytes by component at the highest point of a cycle.

    Captured, each of the two pools of graphs keeps what it needed at its highest.
    """
    memory, peak = dict(cycle.persistent), cycle.memory.peak
    phases = {phase: value for phase, value in peak.items() if phase}
    if is_captured:
        ode = phases.pop(INTEGRATE) - cycle.memory.at_entry[INTEGRATE]
        memory["graph pool, updates"] = float(max(phases.values()))
        memory["graph pool, integration"] = float(ode)
    else:
        memory["activations"] = float(max(phases.values()))
    if has_context:
        memory["CUDA context"] = CONTEXT_BYTES
    return memory


def cycle_of(config: RunConfig, batch: int) -> CycleCost:
    """One cycle of a run at a batch size; errors of :func:`trace_cycle`."""
    terms = [(n, trace_cycle(model, config.distill, batch)) for n, model in terms_of(config)]
    return weighted_cycles(terms)


def cycles_of(config: RunConfig) -> dict[str, CycleCost]:
    """Activation policy -> one cycle of the run with it; without those that its network refuses."""
    cycles = {}
    for policy in POLICIES:
        train = replace(config.train, activation=policy)
        try:
            cycles[policy] = cycle_of(replace(config, train=train), train.batch_size)
        except ValueError:
            if policy == config.train.activation:
                raise
    return cycles


def profiles_of(
    cycles: dict[str, CycleCost], device: Device, efficiency: Efficiency, *, is_captured: bool
) -> list[Profile]:
    """Every activation policy with every kind of optimizer state, the fastest first."""
    profiles = []
    for policy, cycle in cycles.items():
        seconds = total(cycle_phases(cycle, device, efficiency).values())
        memory = memory_of(cycle, is_captured=is_captured, has_context=device.is_gpu)
        numbers = _trained_numbers(cycle)
        for kind in OPTIMIZERS:
            size = sum(memory.values()) - memory["optimizer"] + numbers * moment_bytes(kind)
            profiles.append(Profile(policy, kind, cycle.batch, seconds, size))
    return sorted(profiles, key=lambda profile: profile.seconds)


def _trained_numbers(cycle: CycleCost) -> float:
    """Trained parameters of both roles; masters and gradients are float32."""
    return sum(cycle.gradients.values()) / 4


def _largest_batch(
    limit: float, here: dict[str, float], twice: dict[str, float], batch: int
) -> int:
    """From the memory at two batches: it grows linearly."""
    slope = (sum(twice.values()) - sum(here.values())) / batch
    fixed = sum(here.values()) - slope * batch
    return max(0, int((limit - fixed) / slope))
