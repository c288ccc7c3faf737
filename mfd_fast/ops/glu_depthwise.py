"""The depthwise gated unit of SANA's GLUMBConv, on channels-last tokens, in one pass.

    a   = SiLU(x + in_bias)                               channels of both halves
    z   = 3x3 depthwise convolution of a + bias           padding contributes 0, not SiLU(in_bias)
    out = z[:C] * SiLU(z[C:])

x is ``[R, T, 2C]`` with T = height * width tokens in raster order, weight ``[2C, 1, 3, 3]`` (as
torch has it), bias and in_bias ``[2C]``, out ``[R, T, C]``; SANA 1.6B: T = 1024, C = 5600.  Sums
are in fp32 (float64 for float64).  Traffic in elements per token: read 2C, write C; the five eager
operators (bias, SiLU, convolution, SiLU, product) move 17C.

The backward saves x only and recomputes the rest: read 2C + C, write 2C (4C when the convolution's
weight or bias is trained too).  It walks down the image with three rows of everything it needs, so
nothing of full size is in memory besides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.dispatch import define, differentiable

OP = "glu_depthwise"
_ARGS = "Tensor x, Tensor weight, Tensor bias, Tensor? in_bias, int height, int width"


def _fake(x, weight, bias, in_bias, height, width):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] // 2)


def _fake_backward(grad, x, weight, bias, in_bias, height, width, with_conv):
    return torch.empty_like(x), torch.empty_like(x) if with_conv else x.new_empty(0)


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """``[R, T, C]`` -> ``[R, C, height, width]``, a view."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _reference_backward(grad, x, weight, bias, in_bias, height, width, with_conv):
    pre = x if in_bias is None else x + in_bias
    conv = F.conv2d(_image(F.silu(pre), height, width), weight, bias, padding=1, groups=x.shape[2])
    value, gate = conv.flatten(2).mT.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
    grad_conv = torch.cat([grad * F.silu(gate), grad_gate], dim=-1)
    image = _image(grad_conv, height, width)
    grad_a = F.conv_transpose2d(image, weight, padding=1, groups=x.shape[2]).flatten(2).mT
    grad_x = torch.ops.aten.silu_backward(grad_a, pre).contiguous()
    return grad_x, grad_conv.contiguous() if with_conv else x.new_empty(0)


_forward = define(
    OP,
    f"({_ARGS}) -> Tensor",
    fake=_fake,
    reference=reference.glu_depthwise,
    triton=f"{OP}:{OP}",
    is_compiled=True,
    prefer="triton",
)
_gradients = define(
    f"_{OP}_backward",
    f"(Tensor grad, {_ARGS}, bool with_conv) -> (Tensor grad_x, Tensor grad_conv)",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=f"{OP}:{OP}_backward",
    is_compiled=True,
    prefer="triton",
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, in_bias, ctx.height, ctx.width = inputs
    ctx.save_for_backward(x, weight, bias, in_bias)


def _weight_gradient(x: Tensor, in_bias: Tensor | None, grad_conv: Tensor, size: tuple) -> Tensor:
    """``[2C, 1, 3, 3]``: nine products of a shifted image with grad_conv, each summed in order."""
    pre = x if in_bias is None else x + in_bias
    a = F.pad(_image(F.silu(pre), *size), (1, 1, 1, 1))
    grad = _image(grad_conv, *size)
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = [
        (a[:, :, i : i + size[0], j : j + size[1]] * grad).sum((0, 2, 3), dtype=wide)
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(taps, dim=-1).view(-1, 1, 3, 3).to(x.dtype)


def _backward(ctx, grad):
    x, weight, bias, in_bias = ctx.saved_tensors
    size = (ctx.height, ctx.width)
    needs_weight, needs_bias, needs_in_bias = ctx.needs_input_grad[1:4]
    grad_x, grad_conv = _gradients(
        grad.contiguous(), x, weight, bias, in_bias, *size, needs_weight or needs_bias
    )
    return (
        grad_x,
        _weight_gradient(x, in_bias, grad_conv, size) if needs_weight else None,
        grad_conv.sum((0, 1)) if needs_bias else None,
        grad_x.sum((0, 1)) if needs_in_bias else None,
        None,
        None,
    )


differentiable(OP, _backward, _setup_context)


def _check(x, weight, bias, in_bias, height, width) -> None:
    is_image = x.ndim == 3 and x.shape[1] == height * width > 0
    if not is_image or x.shape[2] % 2 or x.shape[2] == 0 or not x.is_floating_point():
        raise ValueError(
            f"glu_depthwise: x must be floating [R, {height} * {width}, 2C]; "
            f"got {x.dtype} {list(x.shape)}"
        )
    channels = x.shape[2]
    for name, tensor, shape in (
        ("weight", weight, (channels, 1, 3, 3)),
        ("bias", bias, (channels,)),
        ("in_bias", in_bias, (channels,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"glu_depthwise: {name} must be {x.dtype} {list(shape)} on {x.device}, like x; "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def glu_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    *,
    in_bias: Tensor | None = None,
) -> Tensor:
    """``z[:C] * SiLU(z[C:])`` with ``z = depthwise_3x3(SiLU(x + in_bias)) + bias``, ``[R, T, C]``.

    Args:
        x: output of the widening 1x1 convolution without its bias, ``[R, T, 2C]``, T = height *
            width tokens in raster order; copied if not contiguous.
        weight: depthwise filters, ``[2C, 1, 3, 3]``, zero padding of 1; bias: ``[2C]``.
        in_bias: bias of the widening convolution, ``[2C]``; None if x has it already.

    Gradients flow to every tensor.  The one to x is fused; those to weight and bias add a write of
    2C per token and are finished in plain torch.  ``ValueError`` if shapes, dtypes or devices
    disagree.
    """
    _check(x, weight, bias, in_bias, height, width)
    return _forward(
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        None if in_bias is None else in_bias.contiguous(),
        height,
        width,
    )
