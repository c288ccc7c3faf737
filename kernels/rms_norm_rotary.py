"""RMS norm and rotary embedding of queries or keys; the contract is ``ops/rms_norm_rotary.py``.

A program has one token: a tile of its heads, in pairs (a, b) that one angle turns.  The backward
computes the norm again from x, so nothing but x is kept.  Traffic: 1 read and 1 write of x forward,
2 reads and 1 write backward; cos and sin are read once a token, from L2 for every further row.
"""

import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.dot import round_to

ELEMENTS = 1024  # of the tile, for each warp


@triton.jit
def _load_pairs(ptr, stride, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                BLOCK_H: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Both of every pair, [BLOCK_H, PAIRS] fp32; a stride of 0 is one row for all heads."""
    h = tl.arange(0, BLOCK_H)[:, None]
    if HALF:
        i = tl.arange(0, PAIRS)[None, :]
        at, mask = ptr + h * stride + i, (h < H) & (i < D // 2)
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(at + D // 2, mask=mask, other=0.0)
    else:
        d = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(ptr + h * stride + d, mask=(h < H) & (d < D), other=0.0)
        a, b = tl.split(tl.reshape(x, [BLOCK_H, PAIRS, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(ptr, a, b, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                 BLOCK_H: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Into contiguous [H, D]."""
    h = tl.arange(0, BLOCK_H)[:, None]
    a, b = round_to(a, ptr.dtype.element_ty), round_to(b, ptr.dtype.element_ty)
    if HALF:
        i = tl.arange(0, PAIRS)[None, :]
        at, mask = ptr + h * D + i, (h < H) & (i < D // 2)
        tl.store(at, a, mask=mask)
        tl.store(at + D // 2, b, mask=mask)
    else:
        d = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(a, b), [BLOCK_H, 2 * PAIRS])
        tl.store(ptr + h * D + d, x, mask=(h < H) & (d < D))


@triton.jit
def _mean(values, H: tl.constexpr, D: tl.constexpr, ACROSS: tl.constexpr):
    """Over a head, or over all heads of the token."""
    total = tl.sum(values, axis=1, keep_dims=True)
    if ACROSS:
        return tl.sum(total, axis=0, keep_dims=True) / (H * D)
    else:
        return total / D


@triton.jit
def _rms_norm_rotary_kernel(
    grad_ptr,  # [R, T, H, D], or None: the forward
    x_ptr,  # [R, T, H, D] by strides
    weight_ptr,  # [D], [H * D] if ACROSS, or None
    cos_ptr,  # [R or 1, T, D / 2] fp32 by strides
    sin_ptr,
    out_ptr,  # [R, T, H, D]: the result, or the gradient to x
    tokens,
    x_row,
    x_token,
    x_head,
    cos_row,
    cos_token,
    cos_pair,
    sin_row,
    sin_token,
    sin_pair,
    EPS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row, token = pid // tokens, pid % tokens
    i = tl.arange(0, PAIRS)[None, :]
    cos_at = cos_ptr + row * cos_row + token * cos_token + i * cos_pair
    cos = tl.load(cos_at, mask=i < D // 2, other=0.0)
    sin_at = sin_ptr + row * sin_row + token * sin_token + i * sin_pair
    sin = tl.load(sin_at, mask=i < D // 2, other=0.0)
    x_ptr += row * x_row + token * x_token
    a, b = _load_pairs(x_ptr, x_head, H, D, HALF, BLOCK_H, PAIRS)
    rstd = 1.0 / tl.sqrt(_mean(a * a + b * b, H, D, ACROSS) + EPS)
    a, b = a * rstd, b * rstd
    w_a, w_b = 1.0, 1.0
    if weight_ptr is not None:
        w_a, w_b = _load_pairs(weight_ptr, D if ACROSS else 0, H, D, HALF, BLOCK_H, PAIRS)
    if grad_ptr is None:
        a, b = a * w_a, b * w_b
        out_a, out_b = a * cos - b * sin, a * sin + b * cos
    else:
        g_a, g_b = _load_pairs(grad_ptr + pid * H * D, D, H, D, HALF, BLOCK_H, PAIRS)
        u_a, u_b = (g_a * cos + g_b * sin) * w_a, (g_b * cos - g_a * sin) * w_b
        inner = _mean(u_a * a + u_b * b, H, D, ACROSS)
        out_a, out_b = (u_a - a * inner) * rstd, (u_b - b * inner) * rstd
    _store_pairs(out_ptr + pid * H * D, out_a, out_b, H, D, HALF, BLOCK_H, PAIRS)


def _launch(grad: Tensor | None, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor,
            eps: float, layout: str, across: bool) -> Tensor:  # fmt: skip
    rows, tokens, heads, width = x.shape
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    block_h, pairs = triton.next_power_of_2(heads), triton.next_power_of_2(width) // 2
    steps = [0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    _rms_norm_rotary_kernel[(rows * tokens,)](
        grad, x, weight, cos, sin, out, tokens, *x.stride()[:3],
        steps[0], *cos.stride()[1:], steps[1], *sin.stride()[1:],
        EPS=eps, H=heads, D=width, ACROSS=across, HALF=layout == "half",
        BLOCK_H=block_h, PAIRS=pairs,
        num_warps=min(16, max(1, triton.next_power_of_2(2 * block_h * pairs // ELEMENTS))),
    )  # fmt: skip
    return out


def rms_norm_rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    layout: str,
    across: bool,
) -> Tensor:
    """Like x, contiguous.  Inputs are already validated by ``mfd_fast.ops``."""
    return _launch(None, x, weight, cos, sin, eps, layout, across)


def rms_norm_rotary_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    layout: str,
    across: bool,
) -> Tensor:
    """The gradient to x, contiguous."""
    return _launch(grad, x, weight, cos, sin, eps, layout, across)
