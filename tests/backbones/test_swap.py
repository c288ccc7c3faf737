"""Blocks on the host: the same numbers bit for bit, in order, with the bytes of the plan."""

import pytest
import torch
from frozen_bases import flux, plan_of, updates

from mfd_fast.backbones.quantized import FrozenLinear
from mfd_fast.backbones.swap import PLACES, BlockSwap, CpuCopies, plan_swap
from mfd_fast.models.diffusers.family import named

CPU = torch.device("cpu")


class LateCopies(CpuCopies):
    """A copy is done when it is waited for and not before; until then the place holds ones.

    What is read too early, or was not asked to be waited for, is then wrong.
    """

    def __init__(self):
        self.placed, self.host = [], []

    def place(self, size):
        self.placed.append(super().place(size))
        return self.placed[-1]

    def pinned(self, size):
        self.host.append(super().place(size))
        return self.host[-1]

    def start(self, place, host):
        place.fill_(255)
        return place, host

    def wait(self, ticket):
        place, host = ticket
        place.copy_(host)


def swapping(share, made, copies=LateCopies):
    def place(backbone):
        made.append(BlockSwap(backbone.network, plan_of(made[0], share), CPU, copies()))

    return place


@pytest.mark.parametrize("activation", ["none", "cheap", "block", "chunk"])
@pytest.mark.parametrize(("base", "share"), [("bf16", 0.8), ("int8", 0.4)])
def test_swapped_is_resident_bit_for_bit(base, share, activation, monkeypatch):
    monkeypatch.setattr("mfd_fast.backbones.activation.CHUNK", 4)
    resident, _ = updates("flux1-dev", flux(base), activation=activation)
    for copies in (LateCopies, CpuCopies):  # as late as can be, and as early
        made = [flux(base)]
        options = {"place": swapping(share, made, copies), "activation": activation}
        swapped, backbone = updates("flux1-dev", made[0], **options)
        assert all(torch.equal(swapped[role], resident[role]) for role in resident)
        assert made[1].moved > 0
        assert all(not p.requires_grad or p in {*backbone.adapters.parameters()}
                   for p in backbone.parameters())  # fmt: skip


@pytest.mark.parametrize("share", [0.4, 0.5, 0.8])
def test_bytes_on_the_device_are_the_plans(share):
    network, copies = flux("int8"), LateCopies()
    plan = plan_of(network, share)
    BlockSwap(named(network), plan, CPU, copies)
    host = {x.untyped_storage()._cdata for x in copies.host}
    tensors = [*network.parameters(), *network.buffers(), *copies.placed]
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
    on_device = sum(s.nbytes() for key, s in storages.items() if key not in host)
    assert on_device == plan.resident
    assert sum(x.nbytes for x in copies.host) == plan.host_bytes
    assert len(copies.placed) == PLACES


def test_every_block_comes_ahead_once_a_pass_and_the_backward_goes_back():
    network = flux("int8")
    plan = plan_of(network, 0.4)
    swap = BlockSwap(named(network), plan, CPU, LateCopies())
    layers = [next(x for x in named(network).get_submodule(name).modules()
                   if isinstance(x, FrozenLinear)) for name in plan.swapped]  # fmt: skip
    inputs = [torch.randn(1, layer.in_features) for layer in layers]
    with torch.no_grad():
        for _ in range(3):
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
    first = len(swap.blocks[0].host)
    assert (swap.missed, swap.moved) == (1, 3 * plan.host_bytes + first)
    x = [x.requires_grad_() for x in inputs]
    loss = 0.0
    for layer, one in zip(layers, x, strict=True):
        loss = loss + layer(one).sum() + 0 * loss
    before = swap.moved
    loss.backward()
    assert swap.missed == 1
    # The last two are there when it starts, the first two when it ends.
    ends = sum(len(block.host) for block in swap.blocks[-2:])
    assert swap.moved - before == plan.host_bytes - ends


def test_a_plan_swaps_no_more_than_it_must():
    blocks = {f"b{i}": 100 + i for i in range(12)}
    whole = 50 + sum(blocks.values())
    assert plan_swap(blocks, 50, whole).swapped == ()
    plan = plan_swap(blocks, 50, whole - 1)
    assert len(plan.swapped) == 3 and plan.resident <= whole - 1
    for budget in range(300, whole, 50):
        plan = plan_swap(blocks, 50, budget)
        assert plan.resident <= budget
        assert plan.host_bytes == sum(blocks[name] for name in plan.swapped)
        assert len(plan.swapped) > 2
    with pytest.raises(ValueError, match=r"--base-memory must be at least 2\.72e-07 GB"):
        plan_swap(blocks, 50, 100)
