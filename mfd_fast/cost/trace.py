"""A trace: every operator that runs inside, with what it costs, and the memory alive meanwhile.

Run on tensors without storage (``device="meta"``) it takes milliseconds for a network of any size.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    """

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
        given = {x.untyped_storage()._cdata for x in tensors_of((args, *kwargs.values()))}
        out = func(*args, **kwargs)
        made = [x for x in tensors_of(out) if x.untyped_storage()._cdata not in given]
        for tensor in made:
            self.memory.watch(tensor, self.current)
        if self.counts_work and name not in ALLOCATIONS and (given or made):
            self.record(self._op(name, args, kwargs, out))
        return out

    def _op(self, name: str, args: tuple, kwargs: dict, out: Any) -> Op:
        first = next(tensors_of((args, *kwargs.values(), out)))
        flops, moved = operations(name, args, out), traffic(name, (args, *kwargs.values()), out)
        if "segmented_lora" in name:
            share = self.adapter_shares.get(self.current, 1.0)
            flops, moved = flops * share, moved * share
        return Op(name, family_of(name), first.dtype, flops, moved)
