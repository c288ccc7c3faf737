"""The backward kernel of ``norm_modulate.py``.

    g_z    = grad, or grad * (sigmoid(z) + z * sigmoid'(z)) with z recomputed from x
    g_xhat = g_z * gain * (1 + scale_s)
    inner  = mean_C(g_xhat * xhat)                  0 for an "l2" row under the least norm
    grad_x = (g_xhat - xhat * inner - mean_C(g_xhat)) * rstd         the last mean only for "layer"
    sums   = sum over a sample's rows of (g_z * xhat, g_z)            [S, 2, C], only if wanted

Where x came out of a residual branch, grad_x also has the gradient that the stream gets elsewhere
(base), and the branch gets gate_s * grad_x.

xhat comes from x and the saved mean and rstd.  The sums give the gradients to scale, shift and
gain; ``column_sum.py`` is their second stage.

Traffic: 2 reads and 1 write of x, and 2 * 4 * C bytes for each of about PROGRAMS programs if the
sums are wanted.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.column_sum import partition, sum_parts
from mfd_fast.kernels.norm_modulate import (
    choose_tile,
    load_factor,
    load_row,
    row_dot,
    row_stride,
    row_sum,
)

# Programs (of four warps) of a backward pass that sums rows, four for each of an H100's 132
# multiprocessors: more would hide more latency and move more partial sums.  Not measured on a GPU.
PROGRAMS = 528


@triton.jit
def _silu_gradient(grad, xhat, factor, shift_ptr, c, C: tl.constexpr):
    """The gradient to z = xhat * factor + shift from the one to z * sigmoid(z)."""
    z = xhat * factor
    if shift_ptr is not None:
        z += load_row(shift_ptr, c, C, z.dtype)
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return grad * sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def _row_terms(
    grads,
    xhats,
    rstd,
    C: tl.constexpr,
    MAX_RSTD: tl.constexpr,
    KIND: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """What the norm takes from a row's gradient: inner, times xhat, and average.

    grads are 0 outside the C channels, so what xhats are there does not matter.
    """
    inner = row_dot(grads, xhats, CHUNKS) / C
    average = tl.zeros_like(inner)
    if KIND == "l2":  # a row under the least norm was divided by a constant
        inner = tl.where(rstd < MAX_RSTD, inner, 0.0)
    if KIND == "layer":
        average = row_sum(grads, CHUNKS) / C
    return inner, average


@triton.jit
def _load_mean(mean_ptr, row, mask):
    if mean_ptr is None:
        return 0.0
    else:
        return tl.load(mean_ptr + row, mask=mask, other=0.0)


@triton.jit
def _zero_sums(
    COUNT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr
):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_C], dtype=WIDE),)  # noqa: RUF005
    return sums


@triton.jit
def _store_sums(partial_ptr, sums, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr):
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(partial_ptr + c, tl.sum(sums[2 * i], axis=0), mask=c < C)
        tl.store(partial_ptr + C + c, tl.sum(sums[2 * i + 1], axis=0), mask=c < C)


@triton.jit
def _norm_modulate_backward_kernel(
    grad_ptr, x_ptr,  # [S, M, C]
    scale_ptr, shift_ptr,  # [S, C] or None; shift is needed only with SILU
    gain_ptr,  # [C] or None
    mean_ptr, rstd_ptr,  # [S, M]; mean None unless KIND is "layer"
    base_ptr,  # [S, M, C] or None: added to grad_x
    gate_ptr,  # [S, C] or None
    grad_x_ptr,  # [S, M, C]
    grad_branch_ptr,  # [S, M, C], or None without gate
    partial_ptr,  # [S, P, 2, C] or None: sums of grad_z * xhat and of grad_z
    rows, parts, tiles,  # M, P, and tiles of BLOCK_R rows in one part
    gate_stride, scale_stride, shift_stride,
    C: tl.constexpr, KIND: tl.constexpr, SILU: tl.constexpr,
    MAX_RSTD: tl.constexpr,  # KIND "l2": rstd of a row at or under the least norm
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = rstd_ptr.dtype.element_ty
    pid = tl.program_id(0)
    sample = (pid // parts).to(tl.int64)
    columns = tl.broadcast_to(tl.arange(0, BLOCK_C)[None, :], [BLOCK_R, BLOCK_C])
    scale_ptr = None if scale_ptr is None else scale_ptr + sample * scale_stride
    shift_ptr = None if shift_ptr is None else shift_ptr + sample * shift_stride
    gate_ptr = None if gate_ptr is None else gate_ptr + sample * gate_stride
    sums = _zero_sums(0 if partial_ptr is None else 2 * CHUNKS, BLOCK_R, BLOCK_C, WIDE)

    for tile in range(0, tiles):
        r = ((pid % parts) * tiles + tile) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = sample * rows + r
        rstd = tl.load(rstd_ptr + row, mask=r < rows, other=0.0)
        mean = _load_mean(mean_ptr, row, r < rows)
        grads, xhats, new_sums = (), (), ()
        for i in tl.static_range(CHUNKS):
            c = i * BLOCK_C + columns
            mask = (r < rows) & (c < C)
            grad = tl.load(grad_ptr + row * C + c, mask=mask, other=0.0).to(WIDE)
            xhat = tl.load(x_ptr + row * C + c, mask=mask, other=0.0).to(WIDE)
            xhat = (xhat - mean) * rstd
            factor = load_factor(gain_ptr, scale_ptr, c, C, WIDE)
            if SILU:
                grad = _silu_gradient(grad, xhat, factor, shift_ptr, c, C)
            if partial_ptr is not None:
                new_sums = new_sums + (sums[2 * i] + grad * xhat, sums[2 * i + 1] + grad)  # noqa: RUF005
            grads = grads + (grad * factor,)  # noqa: RUF005
            xhats = xhats + (xhat,)  # noqa: RUF005
        sums = new_sums

        inner, average = _row_terms(grads, xhats, rstd, C, MAX_RSTD, KIND, CHUNKS)
        for i in tl.static_range(CHUNKS):
            c = i * BLOCK_C + columns
            grad_x = (grads[i] - xhats[i] * inner - average) * rstd
            mask = (r < rows) & (c < C)
            if base_ptr is not None:
                grad_x += tl.load(base_ptr + row * C + c, mask=mask, other=0.0).to(WIDE)
            tl.store(grad_x_ptr + row * C + c, grad_x, mask=mask)
            if gate_ptr is not None:
                grad_branch = grad_x * load_row(gate_ptr, c, C, WIDE)
                tl.store(grad_branch_ptr + row * C + c, grad_branch, mask=mask)

    if partial_ptr is not None:
        _store_sums(partial_ptr + pid.to(tl.int64) * 2 * C, sums, C, BLOCK_C, CHUNKS)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    base: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    kind: str,
    silu: bool,
    with_sums: bool,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grad_x, grad_branch, sums): grad_branch empty without ``gate``; sums ``[S, 2, C]`` over a
    sample's rows of grad_z * xhat and of grad_z.
    """
    channels = x.shape[-1]
    samples = 1 if scale is None else scale.shape[0]
    grad_x = torch.empty_like(x)
    grad_branch = x.new_empty(0) if gate is None else torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, grad_branch, rstd.new_zeros(samples, 2, channels) if with_sums else None
    rows = rstd.numel() // samples
    tile = choose_tile(channels, x.itemsize, 4 if with_sums else 2)
    tiles = triton.cdiv(rows, tile.rows)
    parts, each = partition(samples, tiles, PROGRAMS) if with_sums else (tiles, 1)
    partial = rstd.new_empty(samples, parts, 2, channels) if with_sums else None
    # A hair under the forward's quotient, which was rounded.
    max_rstd = math.sqrt(channels) / eps * (1 - 1e-6) if kind == "l2" else None
    _norm_modulate_backward_kernel[(samples * parts,)](
        grad, x, scale, shift, gain, mean if kind == "layer" else None, rstd, base, gate,
        grad_x, None if gate is None else grad_branch, partial, rows, parts, each,
        *map(row_stride, (gate, scale, shift)),
        C=channels, MAX_RSTD=max_rstd, KIND=kind, SILU=silu,
        BLOCK_R=tile.rows, BLOCK_C=tile.columns, CHUNKS=tile.chunks, num_warps=tile.num_warps,
    )  # fmt: skip
    return grad_x, grad_branch, sum_parts(partial) if with_sums else None
