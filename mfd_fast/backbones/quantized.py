"""A frozen base in fewer bytes: linear layers that keep codes and make their weight when asked.

    nf4      4-bit codes and a float32 scale for every 64 numbers (QLoRA, Dettmers et al. 2023), by
             bitsandbytes: 0.5625 bytes a number
    int8     codes and a float32 scale a row, max |row| / 127.5: 1 byte
    float8   e4m3 codes and a float32 scale a row, max |row| / 448: 1 byte
    bf16     the weight itself, for a layer that comes from the host (``swap``)

    y = x W^T + b        grad x = grad y W        W = dequantised codes (+ B A of a frozen LoRA)

W is made in the network's dtype by the forward and again by the backward and kept by neither, so
the field is that of the dequantised network.  int8 and float8 are torchao's weight-only formats,
number for number (a test), without its tensors.  The int8 of bitsandbytes rounds its inputs too:
not one field for all batches, and not offered.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.backbones.networks import Patterns, find_modules

FORMATS = ("bf16", "int8", "float8", "nf4")  # from the largest
COMPARED = ("bf16", "int8", "nf4")  # by auto; float8 is as large as int8 and loses more
BLOCK = 64  # numbers of nf4 that share a scale
ALIGN = 16  # bytes
CPU_ROWS = 256  # of a weight that are scaled at once
# Codes by rows: their dtype, least and most, and what the largest number of a row becomes.
CODES = {
    "int8": (torch.int8, -128.0, 127.0, 127.5),
    "float8": (torch.float8_e4m3fn, -448.0, 448.0, 448.0),
}


# Operators that make a weight from its codes, and how often they read or write one in full.
DEQUANTIZE = {"bf16": (0, 0), "int8": (2, 3), "float8": (2, 3), "nf4": (1, 1)}


class Stored(NamedTuple):
    """Bytes of a frozen base.

    blocks: of the linear layers of every block, which can live on the host; rest: of everything
    else; budget: how many may lie on the device, 0: all; plain: of the layers' weights in the
    network's dtype, largest: of the largest of them; layers: how many there are.
    """

    base: str
    blocks: dict[str, int]
    rest: int
    budget: float
    plain: int
    largest: int
    layers: int

    @property
    def moved(self) -> float:
        """Bytes that are read and written to make all weights once."""
        share = DEQUANTIZE[self.base][1]
        return share and sum(self.blocks.values()) + share * self.plain


def check_format(base: str) -> None:
    """``ValueError`` for another format, ``ImportError`` if its library is missing."""
    if base not in FORMATS:
        raise ValueError(f"base must be one of {', '.join(FORMATS)}, got {base!r}")
    if base != "nf4":
        return
    try:
        importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ImportError(
            f"base nf4 needs bitsandbytes, which does not import here ({error}): pip install "
            "bitsandbytes, or take --base int8, which needs no library"
        ) from None


def _sizes(base: str, out_features: int, in_features: int, itemsize: int) -> tuple[int, int]:
    """Bytes of the codes, padded to where the scales begin, and of all."""
    numbers = out_features * in_features
    if base == "bf16":
        return numbers * itemsize, numbers * itemsize
    blocks = math.ceil(numbers / BLOCK)
    codes, scales = (blocks * BLOCK // 2, blocks) if base == "nf4" else (numbers, out_features)
    start = math.ceil(codes / ALIGN) * ALIGN
    return start, start + 4 * scales


@torch.library.custom_op("mfd_fast::dequantize_nf4", mutates_args=())
def dequantize_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[blocks, 64]`` of codes ``[blocks * 32, 1]`` uint8 and scales ``[blocks]`` float32."""
    # As rows of one block: for other widths the library's CPU kernel gives other numbers (0.50.2).
    importlib.import_module("bitsandbytes")
    shape = [len(scales), BLOCK]
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)


@dequantize_nf4.register_fake
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(len(scales), BLOCK, dtype=dtype)


class FrozenLinear(nn.Linear):
    """A frozen ``nn.Linear`` whose weight is ``stored`` bytes, uint8 ``[bytes]``: codes, scales.

    ``arrive`` is called before the bytes are read, where they are not always on the device.
    """

    def __init__(self, linear: nn.Linear, base: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.base, self.dtype = base, linear.weight.dtype
        sizes = _sizes(base, self.out_features, self.in_features, self.dtype.itemsize)
        self.start, size = sizes
        empty = torch.empty(size, dtype=torch.uint8, device=linear.weight.device)
        self.stored = nn.Parameter(empty, requires_grad=False)
        self.bias = linear.bias
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.arrive: Callable[[], None] | None = None

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Keep a weight ``[out, in]``, quantised where it is."""
        wide = weight.detach().to(torch.float32, copy=True)  # changed in place: layers are large
        if self.base == "bf16":
            parts = [weight.detach().to(self.dtype).contiguous()]
        elif self.base == "nf4":
            quantise = importlib.import_module("bitsandbytes.functional").quantize_4bit
            flat = F.pad(wide.flatten(), (0, -wide.numel() % BLOCK)).view(-1, BLOCK)
            made = quantise(flat, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
            parts = [made[0], made[1].absmax.float()]
        else:
            dtype, least, most, largest = CODES[self.base]
            scale = torch.maximum(wide.amax(1, keepdim=True), -wide.amin(1, keepdim=True)) / largest
            scale = scale.clamp_min(torch.finfo(torch.float32).eps)
            codes = wide.mul_(1.0 / scale).round_() if self.base == "int8" else wide.div_(scale)
            parts = [codes.clamp_(least, most).to(dtype), scale]
        for part, begin in zip(parts, (0, self.start), strict=False):
            flat = part.reshape(-1).view(torch.uint8)
            self.stored[begin : begin + len(flat)].copy_(flat)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.arrive is not None:
            self.arrive()
        if torch.is_grad_enabled() and input.requires_grad:
            return _Product.apply(input, self)
        return F.linear(input, self.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, made anew by every reading."""
        if self.arrive is not None:
            self.arrive()
        shape = self.out_features, self.in_features
        codes, scales = self.stored[: self.start], self.stored[self.start :].view(torch.float32)
        if self.base == "bf16":
            weight = codes.view(self.dtype).view(shape)
        elif self.base == "nf4":
            codes = codes[: len(scales) * BLOCK // 2].unsqueeze(1)
            weight = dequantize_nf4(codes, scales, self.dtype).view(-1)
            weight = weight[: shape[0] * shape[1]].view(shape)
        else:
            codes = codes[: shape[0] * shape[1]].view(CODES[self.base][0]).view(shape)
            weight = codes.to(self.dtype)
            # A CPU's product of two dtypes makes two float32 copies of what it multiplies.
            rows = CPU_ROWS if weight.device.type == "cpu" else len(weight)
            for some, scale in zip(weight.split(rows), scales.split(rows), strict=True):
                some.mul_(scale.unsqueeze(1))
        return weight if self.lora_a is None else torch.addmm(weight, self.lora_b, self.lora_a)

    def add_lora(self, a: Tensor, b: Tensor) -> None:
        """Make W + B A the weight, A ``[r, in]``, B ``[out, r]``: kept beside the codes."""
        a, b = (x.to(self.stored.device, self.dtype) for x in (a, b))
        self.lora_a, self.lora_b = (nn.Parameter(x, requires_grad=False) for x in (a, b))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base}"


class _Product(torch.autograd.Function):
    """x W^T + b; the weight is read again in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight, None


def freeze_linears(network: nn.Module, blocks: Patterns, base: str) -> dict[str, FrozenLinear]:
    """Put empty frozen layers in the place of the linear layers of the blocks, by name.

    Those outside (embeddings, the last projection) stay what they are, and so do those that
    diffusers keeps in float32.  ``ValueError`` if the blocks match nothing.
    """
    found, _ = find_modules(network, blocks)
    listed = [getattr(module, "_keep_in_fp32_modules", None) for module in network.modules()]
    wide = {part for names in listed for part in names or ()}
    made = {}
    for block, module in found.items():
        for name, child in [*module.named_modules()]:
            if type(child) is nn.Linear and not wide & {*name.split(".")}:
                parent, _, last = name.rpartition(".")
                frozen = FrozenLinear(child, base)
                setattr(module.get_submodule(parent), last, frozen)
                made[f"{block}.{name}"] = frozen
    if not made:
        raise ValueError(f"base {base}: the network has no linear layers in blocks {blocks!r}")
    return made


def quantize_network(network: nn.Module, blocks: Patterns, base: str) -> None:
    """Keep the linear layers of a network's blocks in another format, in place, layer by layer."""
    weights = {name: x for name, x in network.named_modules() if type(x) is nn.Linear}
    for name, layer in freeze_linears(network, blocks, base).items():
        layer.store(weights.pop(name).weight)
