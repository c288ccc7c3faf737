"""The launches of Triton kernels without running them: which kernel, how specialised, which grid.

A launcher of ``kernels/`` that is called on meta tensors does all that it does on a GPU but launch.
"""

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mfd_fast import AUX, TEACHER, TEACHER_UNCOND

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}


class Launch(NamedTuple):
    """One launch of a kernel: its arguments by name, programs, warps and stages."""

    kernel: JITFunction
    args: dict[str, Any]
    programs: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def bytes(self) -> int:
        """Of every tensor, once."""
        return sum(x.numel() * x.element_size() for x in self.args.values() if torch.is_tensor(x))


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of ``call``, none of which runs."""
    launches = []

    def run(self, *args, grid, warmup, num_warps=4, num_stages=3, **constexprs):
        named = dict(zip(self.arg_names, args, strict=False)) | constexprs
        launches.append(Launch(self, named, prod(grid), num_warps, num_stages))

    kept, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = kept
    return launches


class _Allocations(TorchDispatchMode):
    """Counts the tensors that are made, not those without elements."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "zeros")
        self.count += made and out.numel() > 0
        return out


def counted(call: Callable[[], object]) -> tuple[int, int]:
    """Launches and allocations of ``call``."""
    with _Allocations() as allocations:
        return len(record(call)), allocations.count


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
    """(signature, constexprs, attributes), as Triton derives them from the arguments."""
    signature, constexprs, attrs = {}, {}, {}
    sixteen = [["tt.divisibility", 16]]
    for at, param in enumerate(launch.kernel.params):
        name, value = param.name, launch.args[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif torch.is_tensor(value):
            signature[name], attrs[(at,)] = f"*{TYPES[value.dtype]}", sixteen
        elif isinstance(value, tuple):
            signature[name] = ("i32",) * len(value)
            attrs |= {(at, i): sixteen for i, n in enumerate(value) if n % 16 == 0}
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if signature[name] == "i32" and value % 16 == 0:
                attrs[(at,)] = sixteen
    return signature, constexprs, attrs


def oldest_arch(launch: Launch) -> int:
    """The first architecture that has the launch's types: 89 for e4m3, else 80."""
    return 89 if "*fp8e4nv" in specialise(launch)[0].values() else 80


def compile_launch(launch: Launch, arch: int):
    """The kernel's machine code (``asm["cubin"]``) and metadata for sm_``arch``."""
    source = ASTSource(launch.kernel, *specialise(launch))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


class _Everything(TorchDispatchMode):
    """The names of all kernels that PyTorch and we would launch for meta tensors.

    An operator of ours runs its Triton launcher; one of PyTorch's is one kernel, if it is no view
    and does more than to ask for memory.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.namespace, func.overloadpacket.__name__
        if space == "mfd_fast":
            module = import_module(f"mfd_fast.kernels.{name.strip('_')}")
            made = []
            launches = record(lambda: made.append(getattr(module, name)(*args)))
            self.names += [launch.name for launch in launches]
            return made[0]
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def block_launches(lanes: int) -> list[str]:
    """The kernels of one block of SANA 1.6B in an ODE step of teacher, its null and the auxiliary.

    ``lanes`` are of all samples together: 3, 6, ...  A network of three blocks less one of two.
    """
    from mfd_fast.models import preset
    from mfd_fast.models.sana.backbone import sana_shapes

    found = []
    for depth in (2, 3):
        shapes = sana_shapes(preset("sana-1.6b"), depth=depth)
        backbone, batch = shapes.backbone, lanes // 3
        with torch.no_grad():
            prepared = backbone.prepare(shapes.cond(batch))
            x = torch.empty(batch, 3, *backbone.sample_shape, device="meta")
            t = torch.empty(batch, device="meta")
            for _ in range(2):  # the first makes tables and counters
                with _Everything() as everything:
                    backbone(x, t, prepared, (TEACHER, TEACHER_UNCOND, AUX))
        found.append(Counter(everything.names))
    return sorted((found[1] - found[0]).elements())
