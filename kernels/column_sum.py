"""Deterministic column sums per sample: the second stage of every gradient to a per-sample row.

A backward kernel leaves two planes of partial sums, ``partial[s, p, 0 or 1, c]``: P programs per
sample, no atomics.  Here they become

    sums[s, i, c]  = sum over p of partial[s, p, i, c]                    (skipped if P = 1)
    first[s, c]    = sums[s, 0, c] * factor[c]
    second[s, c]   = sums[s, 1, c]
    total[c]       = sum over s of (weight[s, c] + offset) * sums[s, plane, c]

S samples, P partial sums per sample, C channels.  The order of every sum is fixed by the shape, so
the result is bitwise reproducible.  Traffic: 2 S P C floats once; the caller keeps S P small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P = 16
BLOCK_S = 16
BLOCK_C = 64
NUM_WARPS = 4


@triton.jit
def _sum_parts_kernel(
    partial_ptr,  # [S, P, N]
    sums_ptr,  # [S, N]
    parts,
    n,
    blocks,  # of BLOCK_C columns
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=sums_ptr.dtype.element_ty)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < parts)[:, None] & (c < n)[None, :]
        offset = (sample * parts + p)[:, None] * n + c[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    tl.store(sums_ptr + sample * n + c, tl.sum(total, axis=0), mask=c < n)


@triton.jit
def _finish_kernel(
    sums_ptr,  # [S, 2, C]
    factor_ptr,  # [C] or None (1)
    weight_ptr,  # [S, C], or None: 1 + offset is replaced by 1
    first_ptr,  # [S, C] or None
    second_ptr,  # [S, C] or None
    total_ptr,  # [C] or None
    samples,
    weight_stride,
    C: tl.constexpr,
    OFFSET: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    WIDE: tl.constexpr = sums_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + c, mask=c < C, other=0.0).to(WIDE)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=WIDE)
    for start in range(0, samples, BLOCK_S):
        s = (start + tl.arange(0, BLOCK_S)[:, None]).to(tl.int64)
        mask = (s < samples) & (c < C)
        a = tl.load(sums_ptr + s * 2 * C + c, mask=mask, other=0.0)
        b = tl.load(sums_ptr + s * 2 * C + C + c, mask=mask, other=0.0)
        if first_ptr is not None:
            tl.store(first_ptr + s * C + c, (a * factor).to(first_ptr.dtype.element_ty), mask=mask)
        if second_ptr is not None:
            tl.store(second_ptr + s * C + c, b.to(second_ptr.dtype.element_ty), mask=mask)
        value = a if PLANE == 0 else b
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + s * weight_stride + c, mask=mask, other=0.0).to(WIDE)
            value *= weight + OFFSET
        total += value
    if total_ptr is not None:
        column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        out = tl.sum(total, axis=0).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + column, out, mask=column < C)


def sum_parts(partial: Tensor) -> Tensor:
    """``[S, P, ...]`` -> ``[S, ...]``."""
    samples, parts = partial.shape[:2]
    if parts == 1:
        return partial[:, 0]
    sums = torch.empty_like(partial[:, 0], memory_format=torch.contiguous_format)
    n = sums[0].numel()
    blocks = triton.cdiv(n, BLOCK_C)
    _sum_parts_kernel[(samples * blocks,)](
        partial,
        sums,
        parts,
        n,
        blocks,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=NUM_WARPS,
    )
    return sums


def finish(
    sums: Tensor,
    *,
    first: Tensor | None = None,
    second: Tensor | None = None,
    total: Tensor | None = None,
    factor: Tensor | None = None,
    weight: Tensor | None = None,
    offset: float = 0.0,
    plane: int = 0,
) -> None:
    """Write the wanted outputs from ``sums [S, 2, C]``; a ``weight`` of None stands for 1."""
    samples, _, channels = sums.shape
    _finish_kernel[(triton.cdiv(channels, BLOCK_C),)](
        sums,
        factor,
        weight,
        first,
        second,
        total,
        samples,
        0 if weight is None else weight.stride(0),
        C=channels,
        OFFSET=offset,
        PLANE=plane,
        BLOCK_S=BLOCK_S,
        BLOCK_C=BLOCK_C,
        num_warps=NUM_WARPS,
    )


def partition(samples: int, tiles: int, programs: int) -> tuple[int, int]:
    """(P, tiles per program) for about ``programs`` programs over S samples of ``tiles`` tiles."""
    wanted = max(1, min(tiles, programs // samples))
    each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, each), each


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
