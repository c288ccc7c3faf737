"""RMS norm of queries or keys and their rotary embedding, in one pass.

    z = x / sqrt(mean(x^2) + eps) * weight              mean over a head, or over all heads
    y_a = z_a cos - z_b sin,  y_b = z_a sin + z_b cos   for every pair (a, b) of a head's channels

layout "interleaved": pairs are channels (2 i, 2 i + 1), as FLUX, Qwen-Image, Z-Image, Lumina 2 and
Wan have them; "half": (i, i + D / 2), as Llama and CogView 4.

x is [R, T, H, D] by any strides but the last, cos and sin are [R or 1, T, D / 2] float32 by any
strides: angle i of a token is that of pair i in all its heads.  Arithmetic is float32 (float64 for
float64), cast once at the end.  The backward computes the norm again: of its size only x is kept,
where PyTorch's some fifteen operators keep several tensors in float32.

Traffic in bytes, E = R T H D elements of b bytes: forward 2 E b, backward 3 E b; diffusers' two
functions (norm, rotation) move some 50 E.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import KERNEL_DTYPES, check_kernel_dtype
from mfd_fast.ops.dispatch import define, differentiable

OP = "rms_norm_rotary"
LAYOUTS = ("interleaved", "half")
MAX_TOKEN = 16384  # channels of all heads of a token: a Triton program holds them in registers
_ARGS = "Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps, str layout, bool across"


def _reference_backward(grad, x, weight, cos, sin, eps, layout, across):
    dims = (-2, -1) if across else -1
    x_wide = reference.wide(x)
    rstd = (x_wide.square().mean(dims, keepdim=True) + eps).rsqrt()
    grad_z = reference.rotate(reference.wide(grad), cos, -sin, layout)
    if weight is not None:
        grad_z = grad_z * reference.wide(weight).view(-1 if across else 1, x.shape[3])
    xhat = x_wide * rstd
    inner = (grad_z * xhat).mean(dims, keepdim=True)
    return ((grad_z - xhat * inner) * rstd).to(x.dtype).contiguous()


def _fake(x, weight, cos, sin, eps, layout, across):
    return x.new_empty(x.shape)


_forward = define(
    OP,
    f"({_ARGS}) -> Tensor",
    fake=_fake,
    reference=reference.rms_norm_rotary,
    triton=f"{OP}:{OP}",
)
_gradient = define(
    f"_{OP}_backward",
    f"(Tensor grad, {_ARGS}) -> Tensor",
    fake=lambda grad, *args: _fake(*args),
    reference=_reference_backward,
    triton=f"{OP}:{OP}_backward",
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.layout, ctx.across = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    args = *ctx.saved_tensors, ctx.eps, ctx.layout, ctx.across
    return _gradient(grad.contiguous(), *args), *6 * (None,)


differentiable(OP, _backward, _setup_context)


def _check(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, layout: str, across: bool):
    if layout not in LAYOUTS:
        raise ValueError(f"{OP}: layout must be one of {list(LAYOUTS)}; got {layout!r}")
    if x.ndim != 4 or x.shape[3] % 2 or x.shape[3] == 0 or x.stride(3) != 1:
        raise ValueError(
            f"{OP}: x must be [R, T, H, D] with D even and contiguous; got {list(x.shape)} with "
            f"strides {list(x.stride())}"
        )
    check_kernel_dtype(OP, "x", x)
    rows, tokens, heads, width = x.shape
    if heads * width > MAX_TOKEN:
        raise ValueError(
            f"{OP}: x must have at most {MAX_TOKEN} channels a token; got {heads} heads of {width}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        is_shaped = table.ndim == 3 and table.shape[0] in (1, rows)
        if not is_shaped or table.shape[1:] != (tokens, width // 2):
            raise ValueError(
                f"{OP}: {name} must be [{rows} or 1, {tokens}, {width // 2}]; "
                f"got {list(table.shape)}"
            )
        if table.dtype not in (torch.float32, wide) or table.device != x.device:
            raise ValueError(
                f"{OP}: {name} must be torch.float32 on {x.device}; "
                f"got {table.dtype} on {table.device}"
            )
    size = heads * width if across else width
    if weight is not None and (
        weight.shape != (size,) or not weight.is_contiguous() or (weight.dtype not in KERNEL_DTYPES
        and weight.dtype != x.dtype) or weight.device != x.device
    ):  # fmt: skip
        raise ValueError(
            f"{OP}: weight must be contiguous [{size}] on {x.device}; "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
        )


def rms_norm_rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    layout: str = "interleaved",
    across: bool = False,
) -> Tensor:
    """The rotated norm of x ``[R, T, H, D]``, contiguous, in x's dtype.

    Args:
        weight: of the norm, ``[D]``, or ``[H * D]`` if ``across``; None for 1.
        cos, sin: ``[R, T, D / 2]`` or ``[1, T, D / 2]`` float32, without gradient.
        eps: added to the mean square.
        layout: which channels are a pair, "interleaved" or "half".
        across: the mean square is over all heads of a token, not over each.

    The gradient flows to x; to the weight, if that requires one, through PyTorch's operators.
    Source: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021).  ``ValueError``
    if a shape, dtype, device or stride is another.
    """
    _check(x, weight, cos, sin, layout, across)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return reference.rms_norm_rotary(x, weight, cos, sin, eps, layout, across)
    return _forward(x, weight, cos, sin, eps, layout, across)
