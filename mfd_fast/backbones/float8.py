"""FP8 for lanes without gradient: the frozen network's large matmuls in e4m3.  Off by default.

    y = (x8 w8^T) sx sw + b        x8, sx: x by rows, at every call;  w8, sw: the weight, once

Only matmuls: adapters, norms, attentions, biases and everything between them keep the network's
dtype, and so does every call with gradients.  A copy of a weight takes 1 byte a number, beside the
2 of bf16 that the calls with gradient read.

Which matmuls: K terms, M rows and N outputs cost 2 M K N operations, and quantising x moves 3 M K
bytes.  An H100 (798 TFLOP/s of bf16 measured, fp8 taken as twice that, 3.0 TB/s) saves
M K N / 798e12 seconds and spends 3 M K / 3.0e12, so N must be above 798; with fewer than
798 / 3.0 = 266 rows or terms a product waits for its weight or its result and not for its
operations.  Not measured on a GPU: others' runs leave open 1.0 to 1.5 times as fast, most of it on
consumer cards and from four samples on.  Only matmuls of tokens ``[R, T, K]``: what has one row a
sample or a time, ``[R, K]`` (time embeddings, tables of them), decides about all tokens and costs
little.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mfd_fast.backbones.lanes import Backbone
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.ops.checks import MAX_CHANNELS
from mfd_fast.ops.quantize_rows import quantize_rows

MIN_OUTPUTS = 798
MIN_SIDE = 266
MULTIPLE = 16  # of terms and outputs: what the device's products take
MIN_CAPABILITY = (8, 9)  # Ada, Hopper, Blackwell
TURN_OFF = "or turn it off: --train.no-float8"


class Rows(NamedTuple):
    """A matrix by rows: values ``[M, K]`` e4m3, scale ``[M, 1]`` float32."""

    values: Tensor
    scale: Tensor


def product(x: Rows, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in ``dtype``: ``[M, N]``, sums in float32.

    On a CPU the same numbers are multiplied in float32, slowly.
    """
    if x.values.device.type == "cpu":
        return reference_product(x, weight, bias, dtype)
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scale,
        scale_b=weight.scale.t(),
        bias=bias,
        out_dtype=dtype,
    )


def reference_product(x: Rows, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """:func:`product` on any device."""
    y = (x.values.float() @ weight.values.float().t()) * x.scale * weight.scale.t()
    return (y if bias is None else y + bias).to(dtype)


class Float8Products(TorchFunctionMode):
    """Inside the block ``F.linear`` without gradients takes e4m3 copies of frozen weights.

    Args:
        network: its frozen parameters are what is copied, each at the first call that pays: before
            a graph is captured, and never again.  They must not change afterwards.
        min_side, min_outputs: least rows and terms, and least outputs, of a product that pays.

    ``copies``: (storage, offset, shape) of a weight -> its copy.  Nothing is read back from the
    device and no shape depends on a value, so the block can be captured.  Not captured, every call
    of torch in the block passes through Python once more.
    """

    def __init__(self, network: nn.Module, *, min_side: int, min_outputs: int):
        super().__init__()
        self.min_side, self.min_outputs = min_side, min_outputs
        self.frozen = [p.detach() for p in network.parameters() if not p.requires_grad]
        self.copies: dict[tuple, Rows] = {}
        self._storages = {p.untyped_storage()._cdata for p in self.frozen}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func is F.linear and not torch.is_grad_enabled():
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``, in e4m3 if it pays."""
        if not self._is_worth_it(input, weight):
            return F.linear(input, weight, bias)
        rows = Rows(*quantize_rows(input.reshape(-1, input.shape[-1]).contiguous()))
        y = product(rows, self._copy_of(weight), bias, input.dtype)
        return y.unflatten(0, input.shape[:-1])

    def _is_worth_it(self, x: Tensor, weight: Tensor) -> bool:
        outputs, terms = weight.shape
        return (
            x.ndim > 2
            and outputs >= self.min_outputs
            and terms >= self.min_side
            and x.numel() >= self.min_side * terms
            and outputs % MULTIPLE == terms % MULTIPLE == 0
            and terms <= MAX_CHANNELS
            and x.dtype == weight.dtype
            and weight.untyped_storage()._cdata in self._storages
        )

    def _copy_of(self, weight: Tensor) -> Rows:
        key = (weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape)
        if key not in self.copies:
            self.copies[key] = Rows(*quantize_rows(weight.detach().contiguous()))
        return self.copies[key]


def use_float8(
    backbone: Backbone, *, min_side: int = MIN_SIDE, min_outputs: int = MIN_OUTPUTS
) -> Float8Products:
    """Evaluate lanes without gradient in e4m3 from now on; returns what does it.

    To be called when the network is where it will run, and again if its frozen weights change.
    ``ValueError`` for a backbone of full copies, whose weights are trained, and for a device or
    dtype without such matmuls, or with blocks that are compiled.
    """
    if not isinstance(backbone, SharedBackbone):
        raise ValueError(
            "float8 keeps copies of frozen weights, so it needs a SharedBackbone (adapters on one "
            f"network); got {type(backbone).__name__}, whose weights are trained: distil adapters, "
            f"{TURN_OFF}"
        )
    if backbone.compiler is not None:
        raise ValueError(
            f"float8 does not go together with compiled blocks: leave out --compile, {TURN_OFF}"
        )
    check_device(backbone.device, next(backbone.network.parameters()).dtype)
    backbone.float8 = Float8Products(backbone.network, min_side=min_side, min_outputs=min_outputs)
    return backbone.float8


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """``ValueError`` if a network of ``dtype`` cannot be evaluated in e4m3 there."""
    if dtype == torch.float64:
        raise ValueError(f"float8 stands in for at most 32 bits; got {dtype}: cast, {TURN_OFF}")
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(
            f"float8 needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or "
            f"newer; {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: "
            f"take another one, {TURN_OFF}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"float8 needs a bfloat16 network on a GPU; got {dtype}: cast, {TURN_OFF}")
