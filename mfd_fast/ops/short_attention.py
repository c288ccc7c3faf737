"""Softmax attention over at most 16 tokens in tens of thousands of rows (OccFM: 12 frames a pixel).

    P   = softmax(scale q k^T + bias)    [T, T] per row and head, in fp32 (float64 for float64)
    O   = P v                            [N, H, T, D]
    out = O[n, h, j, m] at element       (j H + h) D + m of row n with merge="normal",
                                         (h T + j) D + m of row n with merge="row_major"

q, k, v are ``[N, T, H, D]`` (N rows, T tokens, H heads of width D), the last dimension contiguous,
the others with any stride: views of a fused product cost no copy.  out is ``[N, T, H D]``.  bias
is ``[H, T, T]``, the same for every row, any strides.  OccFM: N = batch x height x width (2,500 or
625 for a sample), T = 12, H = 8, D = 8, 16 or 32.

The merges differ in nothing but where a head's token is written.  The normal one transposes heads
and tokens; the row-major one views O as it lies in memory as ``[N, T, H D]``, so that token i of
the output is the eight consecutive (head, token) pairs 8 i .. 8 i + 7 (of 8 heads).  OccFM's DiT
blocks merge row-major; its older attention blocks have the bias and the normal merge.

Traffic in elements per (row, token): read 3 H D, write H D; the backward reads 4 H D, writes 3 H D
and recomputes P, so no T x T matrix is in memory in either direction.  The gradients of q, k and v
lie side by side, ``[N, T, 3, H, D]``; ``short_attention_qkv`` hands them on as they are.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import check_like
from mfd_fast.ops.dispatch import define, differentiable

OP = "short_attention"
MAX_TOKENS = 16
MAX_WIDTH = 64
MERGES = ("normal", "row_major")


def _fake(q, k, v, bias, row_major, scale):
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])


def _fake_qkv(qkv, bias, row_major, scale):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4])


def _fake_backward(grad, q, k, v, bias, row_major, scale, with_bias):
    rows, tokens, heads, width = q.shape
    shape = (heads, tokens, tokens) if with_bias else (0,)
    return q.new_empty(rows, tokens, 3, heads, width), q.new_empty(shape, dtype=_wide(q.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _reference_backward(grad, q, k, v, bias, row_major, scale, with_bias):
    rows, tokens, heads, width = q.shape
    grad = grad.view((rows, heads, tokens, width) if row_major else (rows, tokens, heads, width))
    grad = (grad if row_major else grad.transpose(1, 2)).to(_wide(q.dtype))
    q, k, v = (x.transpose(1, 2).to(grad.dtype) for x in (q, k, v))
    scores = scale * (q @ k.mT)
    p = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    parts = (scale * (ds @ k), scale * (ds.mT @ q), p.mT @ grad)
    grad_qkv = torch.stack([x.transpose(1, 2) for x in parts], dim=2)
    return grad_qkv, ds.sum(0) if with_bias else ds.new_empty(0)


def _reference(q, k, v, bias, row_major, scale):
    wide = (x.to(_wide(q.dtype)) for x in (q, k, v))
    return reference.short_attention(*wide, bias, row_major, scale).to(q.dtype)


def _rounded_backward(*args):
    grad_qkv, grad_bias = _reference_backward(*args)
    return grad_qkv.to(args[1].dtype), grad_bias


_forward = define(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, bool row_major, float scale) -> Tensor",
    fake=_fake,
    reference=_reference,
    triton=f"{OP}:{OP}",
    is_compiled=True,
)
_backward_of = define(
    f"_{OP}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, bool row_major, float scale, "
    "bool with_bias) -> (Tensor grad_qkv, Tensor grad_bias)",
    fake=_fake_backward,
    reference=_rounded_backward,
    triton=f"{OP}:{OP}_backward",
    is_compiled=True,
)
# Runs the operator above on every device.
torch.library.define(
    f"mfd_fast::{OP}_qkv", "(Tensor qkv, Tensor? bias, bool row_major, float scale) -> Tensor"
)
torch.library.register_fake(f"mfd_fast::{OP}_qkv")(_fake_qkv)


@torch.library.impl(f"mfd_fast::{OP}_qkv", "CompositeExplicitAutograd")
def _(qkv, bias, row_major, scale):
    return _forward(*qkv.unbind(2), bias, row_major, scale)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.row_major, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad, q, k, v, bias, with_bias):
    grad_qkv, grad_bias = _backward_of(
        grad.contiguous(), q, k, v, bias, ctx.row_major, ctx.scale, with_bias
    )
    return grad_qkv, grad_bias if with_bias else None


def _backward(ctx, grad):
    grad_qkv, grad_bias = _gradients(ctx, grad, *ctx.saved_tensors, ctx.needs_input_grad[3])
    return *grad_qkv.unbind(2), grad_bias, None, None


def _backward_qkv(ctx, grad):
    qkv, bias = ctx.saved_tensors
    parts = qkv.unbind(2)
    return *_gradients(ctx, grad, *parts, bias, ctx.needs_input_grad[1]), None, None


differentiable(OP, _backward, _setup_context)
differentiable(f"{OP}_qkv", _backward_qkv, _setup_context)


def _check(name: str, x: Tensor, like: Tensor, layout: str) -> None:
    """x is floating ``layout``, like its peers, within limits, its last dimension contiguous."""
    if x.ndim != layout.count(",") + 1 or not x.is_floating_point():
        raise ValueError(f"short_attention: {name} must be {layout}; got {x.dtype} {list(x.shape)}")
    if not (1 <= x.shape[1] <= MAX_TOKENS and 1 <= x.shape[-1] <= MAX_WIDTH):
        raise ValueError(
            f"short_attention: {name} must have 1 to {MAX_TOKENS} tokens and heads 1 to "
            f"{MAX_WIDTH} wide; got {list(x.shape)} for {layout}"
        )
    check_like(OP, name, x, "q", like)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"short_attention: {name} must have a contiguous last dimension; "
            f"got strides {list(x.stride())} for {list(x.shape)}"
        )


def _bias(bias: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    if bias is None:
        return None
    shape = (heads, q.shape[1], q.shape[1])
    if bias.shape != shape or not bias.is_floating_point() or bias.device != q.device:
        raise ValueError(
            f"short_attention: bias must be floating {list(shape)} on {q.device}; "
            f"got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )
    return bias.to(_wide(q.dtype))


def _row_major(merge: str) -> bool:
    if merge not in MERGES:
        raise ValueError(f"short_attention: merge must be one of {list(MERGES)}; got {merge!r}")
    return merge == "row_major"


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    merge: str = "normal",
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale q k^T + bias) v`` within every row, heads merged: ``[N, T, H D]``.

    Args:
        q, k, v: ``[N, T, H, D]``, T <= 16, D <= 64, last dimension contiguous, other strides free.
        bias: added to the scores of every row, ``[H, T, T]``; None for none.
        merge: "normal", or "row_major" for OccFM's DiT blocks (see the top of this file).
        scale: None for ``D ** -0.5``.

    Gradients flow to q, k, v and the bias.  ``ValueError`` if shapes, dtypes or devices disagree.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check(name, x, q, "[N, T, H, D]")
    bias = _bias(bias, q, q.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _forward(q, k, v, bias, _row_major(merge), scale)


def short_attention_qkv(
    qkv: Tensor, *, bias: Tensor | None = None, merge: str = "normal", scale: float | None = None
) -> Tensor:
    """:func:`short_attention` on the fused product ``[N, T, 3, H, D]``; its gradient is one tensor.

    With separate q, k and v autograd would copy the three gradients on their way to the product.
    """
    _check("qkv", qkv, qkv, "[N, T, 3, H, D]")
    if qkv.shape[2] != 3:
        raise ValueError(f"short_attention: qkv must be [N, T, 3, H, D]; got {list(qkv.shape)}")
    bias = _bias(bias, qkv, qkv.shape[3])
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.mfd_fast.short_attention_qkv(qkv, bias, _row_major(merge), scale)
