"""Blocks of a frozen base in the host's memory, copied to the device ahead of their use.

The base never changes, so bytes go one way.  Two places on the device take turns: while a block is
used in one, the next comes into the other on a copy stream.  In a backward, which reads the weights
of ``FrozenLinear`` again whatever the activations' policy, the next block is the one before.  A
block that is not where it was expected is copied at once: slower, never wrong.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mfd_fast.backbones.networks import plain_name
from mfd_fast.backbones.quantized import FrozenLinear

PLACES = 2


@dataclass(frozen=True)
class SwapPlan:
    """swapped: names of the blocks that live on the host, in order; place: bytes of each of the
    two places; resident: bytes of the base on the device, the places among them; host_bytes: of the
    swapped blocks, which is also what a pass over all blocks copies.
    """

    swapped: tuple[str, ...]
    place: int
    resident: int
    host_bytes: int


def plan_swap(blocks: dict[str, int], rest: int, budget: float) -> SwapPlan:
    """The fewest blocks on the host so that the base takes at most ``budget`` bytes of the device.

    Args:
        blocks: bytes of every block that can be swapped, in the order of their use.
        rest: bytes of the base besides, which stay.

    They are spread evenly: every copy has the time of the blocks between two of them.
    ``ValueError`` with the least memory if that is more than ``budget``.
    """
    names, count = list(blocks), len(blocks)
    for swapped in range(count + 1):
        chosen = [names[i * count // swapped] for i in range(swapped)]
        host, place = sum(blocks[name] for name in chosen), max(map(blocks.get, chosen), default=0)
        resident = rest + sum(blocks.values()) - host + PLACES * place
        if resident <= budget:
            return SwapPlan(tuple(chosen), place, resident, host)
    raise ValueError(
        f"--base-memory must be at least {resident / 1e9:.3g} GB for this base, got "
        f"{budget / 1e9:.3g}: give that, or take a smaller --base"
    )


class Copies(Protocol):
    """What copies from the host: a ticket for every copy, which those who read wait for."""

    def place(self, size: int) -> Tensor:
        """``[size]`` bytes on the device."""

    def pinned(self, size: int) -> Tensor:
        """``[size]`` bytes on the host."""

    def start(self, place: Tensor, host: Tensor) -> Any:
        """Copy, after all that was asked of the device until now."""

    def wait(self, ticket: Any) -> None:
        """Let what is asked of the device from now on come after the copy."""


class CpuCopies:
    """At once: for a CPU, whose memory the blocks are in already."""

    def place(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    pinned = place

    def start(self, place: Tensor, host: Tensor) -> None:
        place.copy_(host)

    def wait(self, ticket: None) -> None:
        return None


class CudaCopies:
    """On a stream of its own, from pinned memory.  Not measured on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def place(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, place: Tensor, host: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            place.copy_(host, non_blocking=True)
            return self.stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)


class _Block:
    """The layers of a swapped block, and the views of their bytes on the host and in the places."""

    def __init__(self, layers: list[FrozenLinear], copies: Copies, places: Sequence[Tensor]):
        self.layers = layers
        sizes = [len(layer.stored) for layer in layers]
        self.host = copies.pinned(sum(sizes))
        self.views = [x[: sum(sizes)].split(sizes) for x in (self.host, *places)]
        for layer, view in zip(layers, self.views[0], strict=True):
            view.copy_(layer.stored.detach())
        self.put(0)

    def put(self, where: int) -> None:
        """Let the layers read from the host (0) or a place (1, 2)."""
        for layer, view in zip(self.layers, self.views[where], strict=True):
            layer.stored.data = view


class BlockSwap:
    """The swapped blocks of a network on a device.

    Args:
        network: with ``FrozenLinear`` in the blocks; all of it on the CPU.
        plan: by :func:`plan_swap` from the same network.
        device: where everything else goes.
        copies: how bytes come; by default as the device does.

    moved: bytes that were copied; missed: copies that nobody had asked for ahead.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: SwapPlan,
        device: torch.device,
        copies: Copies | None = None,
    ):
        default = CudaCopies(device) if device.type == "cuda" else CpuCopies()
        self.copies = default if copies is None else copies
        self.places = [self.copies.place(plan.place) for _ in range(PLACES)]
        modules = {plain_name(name): module for name, module in network.named_modules()}
        self.blocks = []
        for index, name in enumerate(plan.swapped):
            layers = [x for x in modules[name].modules() if isinstance(x, FrozenLinear)]
            self.blocks.append(_Block(layers, self.copies, self.places))
            for layer in layers:
                layer.arrive = partial(_arrive, weakref.ref(self), index)
        self.current = -1
        self.inside: list[int] = [-1] * PLACES  # which block is in which place
        self.tickets: list[Any] = [None] * PLACES
        self.moved = self.missed = 0
        swapped = {id(layer.stored) for block in self.blocks for layer in block.layers}
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for x in tensors.values():
                    if x is not None and id(x) not in swapped:
                        x.data = x.data.to(device)

    def arrive(self, index: int) -> None:
        """To be called before the bytes of a block are read; at once if it is the current one."""
        if index == self.current:
            return
        before, self.current = self.current, index
        with _disable_current_modes():  # a selective checkpoint counts the operators of a block
            self._come(index, before)

    def _come(self, index: int, before: int) -> None:
        """Let a block be here, and the next on its way."""
        if index not in self.inside:
            self.missed += 1
            self._fetch(index, keep=before)
        self.copies.wait(self.tickets[self.inside.index(index)])
        last = len(self.blocks) - 1
        is_backward = torch._C._current_graph_task_id() != -1
        turns = index == (0 if is_backward else last) and (is_backward or torch.is_grad_enabled())
        ahead = (index + (-1 if is_backward != turns else 1)) % len(self.blocks)
        if ahead not in self.inside:
            self._fetch(ahead, keep=index)

    def _fetch(self, index: int, *, keep: int) -> None:
        """Start copying a block into the place that does not hold ``keep``."""
        place = next(k for k in range(PLACES) if self.inside[k] != keep or keep == -1)
        if self.inside[place] != -1:
            self.blocks[self.inside[place]].put(0)
        block = self.blocks[index]
        self.tickets[place] = self.copies.start(self.places[place][: len(block.host)], block.host)
        block.put(1 + place)
        self.inside[place] = index
        self.moved += len(block.host)


def _arrive(swap: "weakref.ref[BlockSwap]", index: int) -> None:
    """A layer keeps no swap alive: a copy of the network reads from where its bytes are."""
    found = swap()
    if found is not None:
        found.arrive(index)
