"""A trace: every operator that runs inside, with what it costs, and the memory alive meanwhile.

Run on tensors without storage (``device="meta"``) it takes milliseconds for a network of any size.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mfd_fast.cost.operators import ALLOCATIONS, VIEWS, family_of, operations, tensors_of, traffic

OUTSIDE = ""  # the phase of what runs in none


class Op(NamedTuple):
    """One kind of call: an operator at its shapes."""

    name: str
    family: str
    dtype: torch.dtype
    flops: float
    bytes: float


@dataclass
class Work:
    """Calls by kind, weighted: an expected number of calls need not be whole."""

    calls: Counter = field(default_factory=Counter)

    def add(self, other: "Work", times: float = 1.0) -> "Work":
        """Add ``times`` of another's calls; returns itself."""
        for op, count in other.calls.items():
            self.calls[op] += count * times
        return self

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return sum(op.flops * count for op, count in self.calls.items())

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return sum(op.bytes * count for op, count in self.calls.items())

    @property
    def num_ops(self) -> float:
        """Operators that move data: at least one kernel each on a GPU."""
        return sum(self.calls.values())

    def by_family(self) -> dict[str, "Work"]:
        """The same calls, sorted by family."""
        parts: dict[str, Work] = {}
        for op, count in self.calls.items():
            parts.setdefault(op.family, Work()).calls[op] += count
        return parts


class Memory:
    """Bytes of the storages made while it watches and still held, now and at their highest."""

    def __init__(self):
        self.live = 0
        self.peak: Counter = Counter()  # by phase
        self.at_entry: Counter = Counter()  # bytes alive when a phase began
        self._watched: dict[int, weakref.ref] = {}

    def watch(self, tensor: Tensor, phase: str) -> None:
        """Count the tensor's storage until nothing holds it; the second time does nothing."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched:
            return
        self.live += size
        self._watched[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.peak[phase] = max(self.peak[phase], self.live)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self._watched[key]


_attention = F.scaled_dot_product_attention


def _fused_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Softmax attention in one operator, as devices have it.

    On tensors without storage PyTorch's own choice is the unfused one, which would keep a matrix of
    scores for the backward.  So do devices where the caller turns the fused ones off, as for
    forward-mode derivatives, or where the numbers of a head are not neighbours in memory.
    """
    given = (query, key, value)
    is_fused = torch.backends.cuda.flash_sdp_enabled() and all(x.stride(-1) == 1 for x in given)
    if query.device.type != "meta" or not is_fused:
        rest = {"scale": scale, "enable_gqa": enable_gqa}
        return _attention(*given, attn_mask, dropout_p, is_causal, **rest)
    if enable_gqa:  # a device shares the heads of keys and values, which here are made to be seen
        shared = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(shared, dim=-3) for x in (key, value))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Trace(TorchDispatchMode):
    """Records what runs inside by phase (:meth:`phase` has the interface of ``Distiller.phase``).

    Args:
        adapter_shares: phase -> rows with an adapter among the rows that ``segmented_lora`` gets; 1
            if it is not named.  The choice of rows is in a tensor and so has no value here.
        counts_work: False to watch the memory only.

    To find the shape of a result without storage is most of a trace's time, and blocks of a network
    repeat: what a call gave is remembered by its arguments' shapes.
    """

    _known: ClassVar[dict[tuple, tuple[Any, Op | None]]] = {}

    def __init__(
        self, adapter_shares: Mapping[str, float] | None = None, *, counts_work: bool = True
    ):
        super().__init__()
        self.counts_work = counts_work
        self.work: dict[str, Work] = {}
        self.memory = Memory()
        self.adapter_shares = adapter_shares or {}
        self.current = OUTSIDE

    def __enter__(self) -> "Trace":
        # Not a TorchFunctionMode: those are off while a checkpointed block runs again in backward.
        self._outer_attention = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = _fused_attention
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        F.scaled_dot_product_attention = self._outer_attention

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what runs inside to ``name``."""
        outer, self.current = self.current, name
        self.memory.at_entry[name] = self.memory.live
        self.memory.peak[name] = max(self.memory.peak[name], self.memory.live)
        try:
            yield
        finally:
            self.current = outer

    def record(self, op: Op) -> None:
        """Charge one call to the current phase."""
        self.work.setdefault(self.current, Work()).calls[op] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in VIEWS:
            return func(*args, **kwargs)
        call = _described((func, args, kwargs))
        if call in self._known:
            outputs, op = self._known[call]
            out = tree_map_only(Made, Made.again, outputs)
            for tensor in tensors_of(out):
                self.memory.watch(tensor, self.current)
        else:
            out, op = self._ran(func, name, args, kwargs)
            if call is not None and all(x.storage_offset() == 0 for x in tensors_of(out)):
                self._known[call] = tree_map_only(Tensor, Made.of, out), op
        if self.counts_work and op is not None:
            self.record(self._here(op))
        return out

    def _ran(self, func: Any, name: str, args: tuple, kwargs: dict) -> tuple[Any, Op | None]:
        """What the operator returns, and what it costs if it does anything."""
        given = {x.untyped_storage()._cdata for x in tensors_of((args, *kwargs.values()))}
        out = func(*args, **kwargs)
        made = [x for x in tensors_of(out) if x.untyped_storage()._cdata not in given]
        for tensor in made:
            self.memory.watch(tensor, self.current)
        if name in ALLOCATIONS or not (given or made):
            return out, None
        first = next(tensors_of((args, *kwargs.values(), out)))
        flops, moved = operations(name, args, out), traffic(name, (args, *kwargs.values()), out)
        return out, Op(name, family_of(name), first.dtype, flops, moved)

    def _here(self, op: Op) -> Op:
        """The operator for the rows that have an adapter in this phase."""
        if "segmented_lora" not in op.name:
            return op
        share = self.adapter_shares.get(self.current, 1.0)
        return op._replace(flops=op.flops * share, bytes=op.bytes * share)


@dataclass(frozen=True)
class Made:
    """A new tensor without its storage, so that remembering it keeps no memory alive."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> "Made":
        return Made(tuple(x.shape), x.stride(), x.dtype)

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@lru_cache(maxsize=4096)
def _makes_all_it_returns(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and all(x.alias_info is None for x in schema.returns)


def _described(call: tuple[Any, tuple, dict]) -> tuple | None:
    """What decides the result of a call on tensors without storage; None where its result cannot
    be made again from that.
    """
    func, args, kwargs = call
    tensors = list(tensors_of((args, *kwargs.values())))
    is_plain = tensors and all(type(x) in (Tensor, Parameter) and x.is_meta for x in tensors)
    if not is_plain or not _makes_all_it_returns(func):
        return None
    return func, _key(args), _key(tuple(kwargs.items()))


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return type(value), value  # 1, 1.0 and True are equal, and their results are not
