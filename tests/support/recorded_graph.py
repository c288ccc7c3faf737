"""Graphs of CPU tensors, to test capture without a GPU, on memory as merciless as a CUDA graph's.

A CUDA graph knows addresses, not tensors.  In its pool whatever nobody holds any more is given to
the graphs captured later, and a graph overwrites at every replay all that it allocated.  So

    a graph overwrites what was let go before, or while, it was captured
    a graph overwrites what graphs captured later allocated: it may lie where this one keeps
    something in between
    what no graph allocated may be anybody's as soon as nobody holds it

Here the same memory is overwritten at the same moments with NaN, or with a pattern in what is not
floating: a graph that reads memory it does not own shows at once.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from mfd_fast.distill.graphs import refuse_forbidden

Block = tuple[Tensor, int]  # the bytes of a storage [n], and what spoils them

_aliases: Counter[int] = Counter()  # storage -> tensors of recorded graphs on it
_allocated: Counter[int] = Counter()  # storages that recorded graphs allocated


class RecordedPool:
    """What graphs that never run at the same time allocated and left behind, in their order."""

    def __init__(self):
        self.left: list[list[Block]] = []
        self._held: list[Block] = []
        self.gone: list[Block] = []

    def let_go(self) -> list[Block]:
        """The blocks that nobody holds any more since the last call."""
        gone = [block for block in self._held if not is_held(block[0])]
        if gone:
            self._held = [block for block in self._held if is_held(block[0])]
            self.gone += gone
        return gone

    def add(self, blocks: list[Block]) -> None:
        """What a graph allocated, when its capture ends; only what is held now has readers."""
        self.left.append([block for block in blocks if is_held(block[0])])
        self._held += self.left[-1]


class GraphMemory:
    """What one recorded graph allocates and reads."""

    def __init__(self, pool: RecordedPool):
        self.pool = pool
        self._addresses: list[int] = []
        self._own: dict[int, Block] = {}
        self._outer: dict[int, Block] = {}
        weakref.finalize(self, _forget, self._addresses, self._own)
        pool.let_go()
        self._overwritten = {0: list(pool.gone)}  # by the operator with this number
        self._place = len(pool.left)
        spoil(pool.gone)

    def before(self, number: int) -> None:
        """An operator is about to be recorded: it may use what was let go by now."""
        if gone := self.pool.let_go():
            self._overwritten.setdefault(number, []).extend(gone)
            spoil(gone)

    def alias(self, x: Tensor, *, is_result: bool = False) -> Tensor:
        """Another tensor on the memory of x, which does not count as holding it."""
        address = x.untyped_storage()._cdata
        if not _allocated[address] and address not in self._outer:
            if is_result:
                _allocated[address] += 1
            (self._own if is_result else self._outer)[address] = self._block(x)
        return self._counted(x.detach())

    def close(self) -> None:
        """The capture ends."""
        self.pool.add(list(self._own.values()))

    def begin_replay(self) -> None:
        """Overwrite what this graph may, and what it reads without anybody holding it."""
        for blocks in self.pool.left[self._place + 1 :]:
            spoil(blocks)
        spoil([block for block in self._outer.values() if not is_held(block[0])])

    def replay(self, number: int) -> None:
        """Overwrite what this operator may."""
        spoil(self._overwritten.get(number, ()))

    def _block(self, x: Tensor) -> Block:
        whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        is_floating = x.is_floating_point() or x.is_complex()
        value = 0xFF if is_floating else 1 if x.dtype == torch.bool else 0x5A
        return self._counted(whole), value

    def _counted(self, alias: Tensor) -> Tensor:
        address = alias.untyped_storage()._cdata
        _aliases[address] += 1
        self._addresses.append(address)
        return alias


def is_held(x: Tensor) -> bool:
    """Whether anybody but recorded graphs holds the memory of x."""
    storage = x.untyped_storage()  # one more
    return torch._C._storage_Use_Count(storage._cdata) > _aliases[storage._cdata] + 1


def spoil(blocks: list[Block] | tuple[Block, ...]) -> None:
    """Overwrite every byte."""
    for whole, value in blocks:
        whole.fill_(value)


def _forget(addresses: list[int], own: dict[int, Block]) -> None:
    _aliases.subtract(addresses)
    _allocated.subtract(own.keys())


class RecordedGraph(TorchDispatchMode):
    """Records operators on CPU tensors and runs them again into the same tensors.

    Stands in for a CUDA graph: Python does not run at replay, inputs are read where they were at
    capture, and results appear where they appeared at capture.  Memory that a CUDA graph might find
    overwritten is overwritten.
    """

    runs_while_capturing = True

    def __init__(self, generators: Sequence[Generator] = (), pool: RecordedPool | None = None):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.memory = GraphMemory(self.new_pool() if pool is None else pool)

    @staticmethod
    def new_pool() -> RecordedPool:
        return RecordedPool()

    def capture(self, function: Callable[[], Any]) -> Any:
        with self:
            outputs = function()
        self.memory.close()
        return outputs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_forbidden(func, args)
        self.memory.before(len(self.calls))
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """The call with tensors of the graph's own; one that comes twice stays one."""
        made: dict[int, Tensor] = {}

        def own(x: Tensor, **kind: bool) -> Tensor:
            if id(x) not in made:
                made[id(x)] = self.memory.alias(x, **kind)
            return made[id(x)]

        args, kwargs = tree_map_only(Tensor, own, (args, kwargs))
        out = tree_map_only(Tensor, partial(own, is_result=True), out)
        self.calls.append((func, args, kwargs, out))

    def replay(self) -> None:
        self.memory.begin_replay()
        with torch.no_grad():
            for number, (func, args, kwargs, recorded) in enumerate(self.calls):
                self.memory.replay(number)
                out = func(*args, **kwargs)
                for old, new in zip(tree_iter(recorded), tree_iter(out), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)
