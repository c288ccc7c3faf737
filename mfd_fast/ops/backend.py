"""Choosing an implementation, once, when an operator is registered.

``_C`` registers its CPU kernels under the public operators as soon as it is loaded, and its CUDA
kernels as private operators ``mfd_fast::_<name>_cuda`` of the same signature.
"""

from collections.abc import Callable
from importlib import import_module

import torch

from mfd_fast._ext import backend, build_info, has_ext

NAMESPACE = "mfd_fast"


def _has_kernel(name: str, key: str) -> bool:
    return hasattr(torch.ops.mfd_fast, name) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    )


def register_cpu(name: str, reference: Callable) -> None:
    """Run ``reference`` for CPU tensors unless the extension brought a C++ kernel."""
    has_ext()
    if not _has_kernel(name, "CPU"):
        torch.library.impl(f"{NAMESPACE}::{name}", "CPU")(reference)


def register_cuda(
    name: str,
    *,
    triton: str | None = None,
    reference: Callable | None = None,
    prefer: str = "cpp",
) -> None:
    """Register the CUDA implementation.

    Args:
        triton: ``"module:function"`` of the Triton launcher, imported at the first call; None if
            the operator has only a compiled kernel.
        reference: plain PyTorch for an install that has neither; not needed with ``triton``.
        prefer: ``"cpp"`` or ``"triton"``: which one ``auto`` takes when both are there.
    """
    private = f"_{name.lstrip('_')}_cuda"
    is_compiled = bool(build_info().get("cuda")) and _has_kernel(private, "CUDA")
    wanted = prefer if backend() == "auto" else backend()
    if is_compiled and (triton is None or wanted == "cpp"):
        torch.library.impl(f"{NAMESPACE}::{name}", "CUDA")(
            lambda *args: getattr(torch.ops.mfd_fast, private)(*args)
        )
    elif triton is not None:
        torch.library.impl(f"{NAMESPACE}::{name}", "CUDA")(_lazy(triton))
    elif reference is not None:
        torch.library.impl(f"{NAMESPACE}::{name}", "CUDA")(reference)


def _lazy(target: str) -> Callable:
    """Import the launcher at its first call and run it on the device of its first tensor.

    Triton launches on the current device, which need not be where the tensors are.
    """
    module, function = target.split(":")

    def launch(*args):
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        with torch.cuda.device(device):
            return getattr(import_module(module), function)(*args)

    return launch
