"""Choosing an implementation, once, when an operator is registered.

``_C`` registers its CPU kernels under the public operators as soon as it is loaded, and its CUDA
kernels as private operators ``mfd_fast::_<name>_cuda`` of the same signature.
"""

from collections.abc import Callable
from importlib import import_module

import torch

from mfd_fast.ops.extension import backend, build_info, has_ext

NAMESPACE = "mfd_fast"


def _has_kernel(name: str, key: str) -> bool:
    return hasattr(torch.ops.mfd_fast, name) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    )


def register(
    name: str, reference: Callable, *, triton: str | None = None, prefer: str = "cpp"
) -> None:
    """Register the implementations of ``mfd_fast::<name>`` on the CPU and on CUDA.

    The dtype of an operator is that of its first argument.  In float64 it is the reference on CUDA:
    the kernels there have nothing wider than float32.

    Args:
        reference: plain PyTorch of the same signature; what runs where there is nothing else.
        triton: ``"module:function"`` of the Triton launcher, imported at the first call; None if
            the operator has only a compiled kernel.
        prefer: ``"cpp"`` or ``"triton"``: which one ``auto`` takes when both are there.
    """
    has_ext()
    if not _has_kernel(name, "CPU"):
        torch.library.impl(f"{NAMESPACE}::{name}", "CPU")(reference)

    private = f"_{name.lstrip('_')}_cuda"
    is_compiled = bool(build_info().get("cuda")) and _has_kernel(private, "CUDA")
    wanted = prefer if backend() == "auto" else backend()
    kernel = reference
    if is_compiled and (triton is None or wanted == "cpp"):
        kernel = getattr(torch.ops.mfd_fast, private)
    elif triton is not None:
        kernel = _lazy(triton)

    @torch.library.impl(f"{NAMESPACE}::{name}", "CUDA")
    def launch(*args):
        return (reference if args[0].dtype == torch.float64 else kernel)(*args)


def _lazy(target: str) -> Callable:
    """Import the launcher at its first call and run it on the device of its first argument.

    Triton launches on the current device, which need not be where the tensors are.
    """
    module, function = target.split(":")

    def launch(*args):
        with torch.cuda.device(args[0].device):
            return getattr(import_module(module), function)(*args)

    return launch
