"""Memory of a cycle, and the ways to trade it for time: activations, optimizer, base, host."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mfd_fast.backbones.activation import POLICIES
from mfd_fast.backbones.quantized import DEQUANTIZE, Stored
from mfd_fast.backbones.swap import SwapPlan, plan_swap
from mfd_fast.cost.cycle import (
    INTEGRATE,
    CycleCost,
    moment_bytes,
    network_calls,
    trace_cycle,
    weighted_cycles,
)
from mfd_fast.cost.devices import EAGER, Device, Efficiency
from mfd_fast.cost.phases import Phase, Span, copies_of, cycle_phases, total
from mfd_fast.cost.shapes import terms_of
from mfd_fast.cost.trace import Memory, Op, Work
from mfd_fast.run.config import RunConfig

CONTEXT_BYTES = 0.6e9  # CUDA context and libraries; assumed, not measured on a GPU
OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass(frozen=True)
class Profile:
    """A choice between speed and memory, with what it costs.

    bound: what decides the longest phase; base: format of the frozen base where there are several;
    swap: its blocks on the host, if any.
    """

    activation: str
    optimizer: str
    batch: int
    seconds: Span
    bytes: float
    bound: str
    base: str = ""
    swap: SwapPlan | None = None


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
    cycles: dict[str, CycleCost],
    device: Device,
    efficiency: Efficiency,
    *,
    is_captured: bool,
    base: str = "",
) -> list[Profile]:
    """Every activation policy with every kind of optimizer state, the fastest first."""
    profiles = []
    for policy, cycle in cycles.items():
        phases = cycle_phases(cycle, device, efficiency)
        memory = memory_of(cycle, is_captured=is_captured, has_context=device.is_gpu)
        for kind in OPTIMIZERS:
            size = _with_optimizer(memory, cycle, kind)
            profiles.append(_profile((policy, kind), cycle, phases, size, base))
    return sorted(profiles, key=lambda profile: profile.seconds)


def bases_of(
    config: RunConfig,
    cycles: dict[str, CycleCost],
    device: Device,
    efficiency: Efficiency,
    *,
    is_captured: bool,
) -> dict[str, list[Profile]]:
    """Format of the frozen base -> its profiles, the config's own first; where none fits, those
    with blocks on the host too.  cycles: of the config itself, by activation policy; those of other
    formats follow from it on the plain base (:func:`on_base`).
    """
    made, plain = {}, cycles
    for base, other in (config.bases() or {"": config}).items():
        is_own, stored = not made, other.stored()
        if base == "bf16" and not is_own:
            plain = cycles_of(other)
        its = cycles
        if not is_own:
            its = {name: on_base(x, stored, config, name) for name, x in plain.items()}
        found = profiles_of(its, device, efficiency, is_captured=is_captured, base=base)
        if stored is not None and not fitting(found, device):
            found += _swapped(other, stored, its, device, efficiency)
        made[base] = found
    return made


def on_base(cycle: CycleCost, stored: Stored, config: RunConfig, policy: str) -> CycleCost:
    """A cycle on the plain base with the weights made from codes in every pass, and twice where
    blocks are computed again.
    """
    kernels, _ = DEQUANTIZE[stored.base]
    if not kernels:
        return cycle
    each = Op("dequantize", "memory", torch.uint8, 0.0, stored.moved / kernels / stored.layers)
    phases = {name: Work().add(work) for name, work in cycle.phases.items()}
    rows = cycle.batch // config.distill.micro_batches
    for name, passes in network_calls(config.distill, rows).items():
        times = 2 if name.endswith("/backward") and policy != "none" else 1
        phases[name].calls[each] += times * passes * kernels * stored.layers
    memory = Memory()
    for name, peak in cycle.memory.peak.items():
        memory.peak[name] = peak + stored.largest
        memory.at_entry[name] = cycle.memory.at_entry[name]
    weights = cycle.persistent["weights"] - stored.plain + sum(stored.blocks.values())
    return replace(
        cycle, phases=phases, memory=memory, persistent=cycle.persistent | {"weights": weights}
    )


def _swapped(
    config: RunConfig,
    stored: Stored,
    cycles: dict[str, CycleCost],
    device: Device,
    efficiency: Efficiency,
) -> list[Profile]:
    """Profiles with as many blocks on the host as it takes, launched from Python; none where that
    is not enough.
    """
    made = []
    eager = efficiency if efficiency.phases else replace(efficiency, host=EAGER)
    for policy, cycle in cycles.items():
        memory = memory_of(cycle, is_captured=False, has_context=device.is_gpu)
        for kind in OPTIMIZERS:
            all_here = stored.rest + sum(stored.blocks.values())
            others = _with_optimizer(memory, cycle, kind) - all_here
            try:  # at least one: with none the run would be captured, and was found too large
                budget = min(device.memory - others, all_here - 1)
                swap = plan_swap(stored.blocks, stored.rest, budget)
            except ValueError:
                continue
            phases = cycle_phases(cycle, device, eager, copies_of(config, swap, device))
            size = others + swap.resident
            made.append(_profile((policy, kind), cycle, phases, size, stored.base, swap))
    return made


def _profile(
    names: tuple[str, str],
    cycle: CycleCost,
    phases: dict[str, Phase],
    size: float,
    base: str,
    swap: SwapPlan | None = None,
) -> Profile:
    longest = max(phases.values(), key=lambda phase: phase.seconds)
    return Profile(*(*names, cycle.batch, total(phases.values()), size, longest.bound, base, swap))


def fitting(profiles: Iterable[Profile], device: Device) -> list[Profile]:
    """Those that the device's memory holds."""
    return [profile for profile in profiles if profile.bytes <= device.memory]


def best_of(profiles: list[Profile], device: Device) -> Profile:
    """The fastest that fits, or else the smallest."""
    found = fitting(profiles, device)
    if found:
        return min(found, key=lambda profile: profile.seconds)
    return min(profiles, key=lambda profile: profile.bytes)


def _with_optimizer(memory: dict[str, float], cycle: CycleCost, kind: str) -> float:
    """Bytes of all components with another kind of optimizer state."""
    moments = _trained_numbers(cycle) * moment_bytes(kind)
    return sum(memory.values()) - memory["optimizer"] + moments


def _trained_numbers(cycle: CycleCost) -> float:
    """Trained parameters of both roles; masters and gradients are float32."""
    return sum(cycle.gradients.values()) / 4
