"""Time, memory, energy and communication of a run on a device, from what a cycle does.

    seconds of an operator = max(operations / rate, bytes / bandwidth), each rate times its share
    seconds of a phase     = max(sum over its operators, operators x launch)
    where it was measured  = sum over its operators / share + operators x host (``cost.measured``)

Not counted: text encoding, decoding of images, evaluation, reading data.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

from mfd_fast.backbones.activation import POLICIES
from mfd_fast.cost.cycle import (
    INTEGRATE,
    CycleCost,
    is_interval,
    moment_bytes,
    trace_cycle,
    weighted_cycles,
)
from mfd_fast.cost.devices import Device, Efficiency
from mfd_fast.cost.shapes import terms_of
from mfd_fast.cost.trace import Work
from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import run_is_captured

CONTEXT_BYTES = 0.6e9  # CUDA context and libraries; assumed, not measured on a GPU
GPUS_PER_MACHINE = 8
NETWORK_BYTES_S = 50e9  # 400 Gbit/s a GPU between machines; assumed
MESSAGE_SECONDS = 20e-6  # of one step of an all-reduce; assumed
OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass(frozen=True)
class Profile:
    """A choice between speed and memory, with what it costs."""

    activation: str
    optimizer: str
    batch: int
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """A run of ``config`` on ``gpus`` devices, ``cycle.batch`` samples an update on each.

    seconds: of one cycle by phase; memory: bytes by component on one device.
    largest_batch: the most samples an update that fit; 0 if one does not.
    cheapest: the fastest of the profiles that fit at this batch, or None; smallest: the one that
    needs least.
    """

    config: RunConfig
    device: Device
    efficiency: Efficiency
    gpus: int
    cycle: CycleCost
    seconds: dict[str, float]
    memory: dict[str, float]
    largest_batch: int
    cheapest: Profile | None
    smallest: Profile

    @property
    def cycle_seconds(self) -> float:
        """One cycle without communication."""
        return sum(self.seconds.values())

    @property
    def cycles(self) -> float:
        """Cycles of the whole run."""
        return self.config.train.updates / self.config.distill.student_updates

    @property
    def hours(self) -> float:
        """Of the whole run, communication included."""
        return self.cycles * (self.cycle_seconds + self.communication(self.gpus)) / 3600

    @property
    def kilowatt_hours(self) -> float:
        """At the power limit all the time: an upper bound."""
        return self.hours * self.gpus * self.device.watts / 1000

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
        seconds=cycle_seconds(cycle, device, efficiency),
        memory=here,
        largest_batch=_largest_batch(device.memory, here, twice, batch),
        cheapest=next((p for p in profiles if p.bytes <= device.memory), None),
        smallest=min(profiles, key=lambda p: p.bytes),
    )


def cycle_seconds(cycle: CycleCost, device: Device, efficiency: Efficiency) -> dict[str, float]:
    """phase -> seconds of a cycle."""
    return {
        name: phase_seconds(work, device, efficiency, name) for name, work in cycle.phases.items()
    }


def phase_seconds(work: Work, device: Device, efficiency: Efficiency, phase: str = "") -> float:
    """Seconds of a phase's work."""
    total = 0.0
    for op, count in work.calls.items():
        share = efficiency.shares.get(op.family, efficiency.bandwidth)
        compute = op.flops / (device.flops(op.dtype) * share)
        total += count * max(compute, op.bytes / (device.bandwidth * efficiency.bandwidth))
    fit = efficiency.fit_of(phase)
    if fit is None:
        return max(total, work.num_ops * efficiency.host_seconds)
    return total / fit.share + work.num_ops * fit.host_seconds


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
        seconds = sum(cycle_seconds(cycle, device, efficiency).values())
        memory = memory_of(cycle, is_captured=is_captured, has_context=device.is_gpu)
        numbers = _trained_numbers(cycle)
        for kind in OPTIMIZERS:
            total = sum(memory.values()) - memory["optimizer"] + numbers * moment_bytes(kind)
            profiles.append(Profile(policy, kind, cycle.batch, seconds, total))
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
