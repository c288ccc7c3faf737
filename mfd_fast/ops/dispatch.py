"""Choosing an implementation, once, when an operator is registered.

``_C`` registers its CPU kernels under the public operators as soon as it is loaded, and its CUDA
kernels as private operators ``mfd_fast::_<name>_cuda`` of the same signature.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec

import torch

from mfd_fast.ops.extension import backend, build_info, has_ext

NAMESPACE = "mfd_fast"


def _has_kernel(name: str, key: str) -> bool:
    return hasattr(torch.ops.mfd_fast, name) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    )


def define(
    name: str,
    schema: str,
    *,
    fake: Callable,
    reference: Callable,
    triton: str | None = None,
    is_compiled: bool = False,
    prefer: str = "cpp",
) -> Callable:
    """Declare ``mfd_fast::<name>`` with its implementations on the CPU and on CUDA; the operator.

    The dtype of an operator is that of its first argument.  In float64 it is the reference on CUDA:
    the kernels there have nothing wider than float32.

    Args:
        fake: shapes and dtypes of the results.
        reference: plain PyTorch of the same signature; what runs where there is nothing else.
        triton: ``"module:function"`` of the launcher in ``mfd_fast.kernels``, imported at the first
            call; None if the operator has only a compiled kernel.
        is_compiled: whether ``csrc/cuda`` has the operator.
        prefer: ``"cpp"`` or ``"triton"``: which one ``auto`` takes when both are there: what
            was measured, or else counted (docs/lab-notes.md), to be faster.
    """
    private = f"_{name.lstrip('_')}_cuda"
    for one in (name, private)[: 1 + is_compiled]:
        torch.library.define(f"{NAMESPACE}::{one}", schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}")(fake)
    has_ext()
    if not _has_kernel(name, "CPU"):
        torch.library.impl(f"{NAMESPACE}::{name}", "CPU")(reference)

    has_cuda = bool(build_info().get("cuda")) and _has_kernel(private, "CUDA")
    choice = backend()
    if choice == "auto":
        choice = prefer if find_spec("triton") else "cpp"
    kernel = reference
    if has_cuda and (triton is None or choice == "cpp"):
        kernel = getattr(torch.ops.mfd_fast, private)
    elif triton is not None:
        kernel = _lazy(triton)

    @torch.library.impl(f"{NAMESPACE}::{name}", "CUDA")
    def launch(*args):
        return (reference if args[0].dtype == torch.float64 else kernel)(*args)

    return getattr(torch.ops.mfd_fast, name)


def differentiable(name: str, backward: Callable, setup: Callable) -> None:
    """``backward(ctx, *grads)`` of ``mfd_fast::<name>``; ``setup(ctx, inputs, output)`` keeps."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup)


def wanted(grads: Iterable, needs: Iterable[bool]) -> Iterator:
    """The gradients that are asked for, None in place of the others."""
    return (grad if need else None for grad, need in zip(grads, needs, strict=True))


def _lazy(target: str) -> Callable:
    """Import the launcher at its first call and run it on the device of its first argument.

    Triton launches on the current device, which need not be where the tensors are.
    """
    module, function = target.split(":")

    def launch(*args):
        with torch.cuda.device(args[0].device):
            return getattr(import_module(f"mfd_fast.kernels.{module}"), function)(*args)

    return launch
