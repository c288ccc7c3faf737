"""Seconds of a phase from its work, and what blocks of the base that live on the host change.

seconds of an operator = max(operations / rate, bytes / bandwidth), each rate times its share
device of a phase      = sum over its operators
host of a phase        = operators x launch, which others measured as a range
copies of a phase      = passes x bytes of the swapped blocks / PCIe
seconds of a phase     = max(host, device, copies): launches are queued and blocks come while
                         the device works
where it was measured  = sum over its operators / share + operators x host (``cost.measured``)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from mfd_fast.backbones.swap import PLACES, SwapPlan, plan_swap
from mfd_fast.cost.cycle import CycleCost, network_calls
from mfd_fast.cost.devices import Device, Efficiency
from mfd_fast.cost.trace import Work
from mfd_fast.run.config import RunConfig


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
    copies: seconds in which blocks of the base come from the host.
    """

    host: Span
    device: float
    is_sum: bool = False
    copies: float = 0.0

    @property
    def seconds(self) -> Span:
        """Of both together."""
        if self.is_sum:
            return self.host.times(1.0, self.device)
        least = max(self.device, self.copies)
        return Span(max(self.host.low, least), max(self.host.high, least))

    @property
    def bound(self) -> str:
        """What decides: "PCIe", "host", "device", or "either" where the range has both."""
        if self.copies > max(self.host.high, self.device):
            return "PCIe"
        if self.host.low > self.device:
            return "host"
        return "device" if self.host.high <= self.device else "either"


def total(phases: Iterable[Phase]) -> Span:
    """Seconds of phases one after the other."""
    spans = [phase.seconds for phase in phases]
    return Span(sum(span.low for span in spans), sum(span.high for span in spans))


def cycle_phases(
    cycle: CycleCost,
    device: Device,
    efficiency: Efficiency,
    copies: Mapping[str, float] | None = None,
) -> dict[str, Phase]:
    """phase -> seconds of a cycle; copies: phase -> those in which blocks come from the host."""
    phases = {name: phase_of(x, device, efficiency, name) for name, x in cycle.phases.items()}
    return {name: replace(x, copies=(copies or {}).get(name, 0.0)) for name, x in phases.items()}


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


def swap_of(config: RunConfig) -> SwapPlan | None:
    """The blocks of the frozen base that live on the host as the config asks; None for none.

    ``ValueError`` if the rest does not fit.
    """
    stored = config.stored()
    if stored is None or not stored.budget:
        return None
    plan = plan_swap(stored.blocks, stored.rest, stored.budget)
    return plan if plan.swapped else None


def copies_of(config: RunConfig, swap: SwapPlan | None, device: Device) -> dict[str, float]:
    """phase -> seconds of a cycle in which the swapped blocks come."""
    if swap is None:
        return {}
    calls = network_calls(config.distill, config.train.batch_size // config.distill.micro_batches)
    return {name: count * swap.host_bytes / device.pcie for name, count in calls.items()}


def swapped_memory(memory: dict[str, float], swap: SwapPlan | None) -> dict[str, float]:
    """Bytes by component, the swapped blocks gone and the places that they come to there."""
    if swap is None:
        return memory
    return memory | {"weights": memory["weights"] - swap.host_bytes + PLACES * swap.place}
