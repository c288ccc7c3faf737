"""Time, memory, energy and communication of a run on a device, from what a cycle does.

Not counted: text encoding, decoding of images, evaluation, reading data.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

from mfd_fast.backbones.swap import SwapPlan
from mfd_fast.cost.cycle import CycleCost, is_interval
from mfd_fast.cost.devices import COMPILED, EAGER, REPLAYED, Device, Efficiency
from mfd_fast.cost.phases import (
    Phase,
    Span,
    copies_of,
    cycle_phases,
    swap_of,
    swapped_memory,
    total,
)
from mfd_fast.cost.plans import (
    Profile,
    bases_of,
    best_of,
    cycle_of,
    cycles_of,
    fitting,
    memory_of,
)
from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import run_is_captured, why_eager

GPUS_PER_MACHINE = 8
NETWORK_BYTES_S = 50e9  # 400 Gbit/s a GPU between machines; assumed
MESSAGE_SECONDS = 20e-6  # of one step of an all-reduce; assumed
# How another way to launch is asked for.
WAYS = {
    EAGER.how: "--train.capture off",
    COMPILED.how: "blocks under torch.compile (no setting)",
    REPLAYED.how: "--train.capture on",
}


@dataclass(frozen=True)
class Choice:
    """The same cycle another way: what a sample takes, and the memory."""

    how: str
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
    bases: what :func:`best_of` takes on every format of the frozen base, where there are several;
    swap: its blocks on the host as the config asks.
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
    bases: tuple[Profile, ...]
    swap: SwapPlan | None

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
    swap = swap_of(config)
    here, twice = (swapped_memory(size(x), swap) for x in (cycle, double))
    bases = bases_of(config, cycles, device, efficiency, is_captured=is_captured)
    profiles = [profile for found in bases.values() for profile in found]
    return Estimate(
        config=config,
        device=device,
        efficiency=efficiency,
        gpus=gpus,
        cycle=cycle,
        phases=cycle_phases(cycle, device, efficiency, copies_of(config, swap, device)),
        memory=here,
        choices=_choices(config, cycle, double, device, efficiency),
        largest_batch=_largest_batch(device.memory, here, twice, batch),
        cheapest=min(fitting(profiles, device), key=lambda p: p.seconds, default=None),
        smallest=min(profiles, key=lambda p: p.bytes),
        bases=tuple(best_of(found, device) for found in bases.values() if len(bases) > 1),
        swap=swap,
    )


def _choices(
    config: RunConfig, cycle: CycleCost, double: CycleCost, device: Device, used: Efficiency
) -> tuple[Choice, ...]:
    """Every way to launch, where what it costs is assumed, and twice the batch."""
    if used.phases or not device.is_gpu:
        return ()
    can_capture = not why_eager(config.distill, "cuda", is_sharded=config.train.shard == "fsdp")
    ways = [
        (asked_by(host.how, config), cycle, replace(used, host=host))
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


def asked_by(how: str, config: RunConfig) -> str:
    """What is typed for a way to launch, where there is a setting."""
    option = "--compile"
    return option if how == COMPILED.how and option in config.SHORT else WAYS[how]


def _memory(cycle: CycleCost, way: Efficiency) -> dict[str, float]:
    return memory_of(cycle, is_captured=way.host.how == REPLAYED.how, has_context=True)


def _largest_batch(
    limit: float, here: dict[str, float], twice: dict[str, float], batch: int
) -> int:
    """From the memory at two batches: it grows linearly."""
    slope = (sum(twice.values()) - sum(here.values())) / batch
    fixed = sum(here.values()) - slope * batch
    return max(0, int((limit - fixed) / slope))
