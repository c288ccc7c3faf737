"""What a piece of code costs, counted: operations, operators, bytes kept and still alive."""

import inspect
from functools import partial

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dispatched operators that move no data: no kernel on a GPU.
FREE = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "alias", "detach", "t"),
    *("transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "unbind"),
    *("split", "split_with_sizes", "chunk", "unflatten", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty"),
}


def torchs_counter():
    """PyTorch's own counter, told that the CPU's fused attention is one like the GPU's."""
    aten = torch.ops.aten
    same = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop_count,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop_count,
    }
    kept = {op: partial(_first_shapes, count) for op, count in same.items()}
    return FlopCounterMode(display=False, custom_mapping=kept)


def _first_shapes(count, *shapes, **_):
    return count(*shapes[: len(inspect.signature(count).parameters)])


class Count(TorchDispatchMode):
    """Compute operators dispatched inside the block: ``ops`` by name, ``total`` together."""

    def __init__(self):
        super().__init__()
        self.ops = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.ops[name] = self.ops.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.ops.values())


class Traffic(TorchDispatchMode):
    """``bytes`` that the compute operators inside the block read and write, once each."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in FREE:
            inputs = {id(x): x for x in tree_iter((args, kwargs or {})) if is_tensor(x)}
            outputs = [x for x in tree_iter(out) if is_tensor(x)]
            self.bytes += sum(x.numel() * x.itemsize for x in (*inputs.values(), *outputs))
        return out


class Saved:
    """``bytes`` of the distinct storages that autograd packs inside the block.

    Parameters and views of them (``weight.t()``) are not counted: they are there anyway.

    Selective checkpointing keeps results without packing them: see ``Alive``.
    """

    def __init__(self):
        self.bytes, self._seen = 0, set()

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        owner = tensor if tensor._base is None else tensor._base
        if storage._cdata not in self._seen and not isinstance(owner, torch.nn.Parameter):
            self._seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc):
        return self._hooks.__exit__(*exc)


class Alive(TorchDispatchMode):
    """``bytes`` of the storages made inside the block that something still holds when asked."""

    def __init__(self):
        super().__init__()
        self._storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_of(x)._cdata for x in tree_iter((args, kwargs)) if is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_iter(out)):
            storage = storage_of(tensor)
            if storage._cdata not in given:
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def bytes(self):
        return sum(size for storage, size in self._storages.values() if not storage.expired())


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def storage_of(tensor):
    return tensor.untyped_storage()
