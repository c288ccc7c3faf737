"""Loss, distance and gradient of Mean Flow Distillation; the contract is ``ops/mfd_loss.py``.

Samples are [B, N].  Every program leaves two partial sums (8 bytes) and a second kernel adds them
in a fixed order: no atomics, the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 1024 elements over 4 warps: per thread one 16-byte access in bf16 (two in fp32) to each of three
# inputs.  The second kernel is one program; it walks through rows and partial sums in tiles.
BLOCK_N = 1024
NUM_WARPS = 4
FINISH_ROWS = 8  # 16 spill a register on sm_90
FINISH_PARTS = 64


@triton.jit
def _mfd_loss_kernel(
    x_ptr,  # [B, N]
    teacher_ptr,  # [B, N]
    aux_ptr,  # [B, N]
    span_ptr,  # [B] fp32
    weight_ptr,  # [B] fp32 or None
    grad_ptr,  # [B, N]
    partial_ptr,  # [2, B, P]: <d, x>, then <d, d>
    n,
    blocks,  # P: programs of BLOCK_N elements in one sample
    stride_teacher,
    stride_aux,
    numel,
    BLOCK_N: tl.constexpr,
):
    WIDE: tl.constexpr = partial_ptr.dtype.element_ty
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    column = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < n
    x = tl.load(x_ptr + row * n + column, mask=mask, other=0.0).to(WIDE)
    teacher = tl.load(teacher_ptr + row * stride_teacher + column, mask=mask, other=0.0).to(WIDE)
    aux = tl.load(aux_ptr + row * stride_aux + column, mask=mask, other=0.0).to(WIDE)

    scale = 1.0 / tl.load(span_ptr + row).to(WIDE)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + row).to(WIDE)
    diff = aux - teacher
    grad = (diff * (scale / numel)).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row * n + column, grad, mask=mask)
    tl.store(partial_ptr + pid, tl.sum(diff * x, axis=0))
    tl.store(partial_ptr + tl.num_programs(0) + pid, tl.sum(diff * diff, axis=0))


@triton.jit
def _mfd_loss_finish_kernel(
    partial_ptr,  # [2, B, P]
    span_ptr,  # [B] fp32
    weight_ptr,  # [B] fp32 or None
    loss_ptr,  # [1]
    distance_ptr,  # [B]
    rows,
    blocks,  # P
    numel,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    total = tl.zeros([BLOCK_R], dtype=tl.float64)
    for first_row in range(0, rows, BLOCK_R):
        r = first_row + tl.arange(0, BLOCK_R)
        dots = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float64)
        squares = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float64)
        for first in range(0, blocks, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            mask = (r < rows)[:, None] & (p < blocks)[None, :]
            at = r[:, None] * blocks + p[None, :]
            dots += tl.load(partial_ptr + at, mask=mask, other=0.0)
            squares += tl.load(partial_ptr + rows * blocks + at, mask=mask, other=0.0)
        span = tl.load(span_ptr + r, mask=r < rows, other=1.0).to(tl.float64)
        distance = tl.sqrt(tl.sum(squares, axis=1)) / tl.abs(span)
        tl.store(distance_ptr + r, distance.to(distance_ptr.dtype.element_ty), mask=r < rows)
        scale = 1.0 / span
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + r, mask=r < rows, other=0.0)
        total += tl.sum(dots, axis=1) * scale
    loss = tl.sum(total, axis=0) / numel
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


def mfd_loss(
    x: Tensor, end_teacher: Tensor, end_aux: Tensor, span: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch both kernels.  Inputs are already validated by ``mfd_fast.ops``.

    More than one launch and allocation: partial sums in a fixed order, then their sum.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad = torch.empty_like(x)
    if x.numel() == 0:
        return x.new_zeros((), dtype=wide), x.new_zeros(x.shape[:1], dtype=wide), grad
    loss = x.new_empty((), dtype=wide)
    distance = x.new_empty(x.shape[:1], dtype=wide)
    rows = x.shape[0]
    n = x.numel() // rows
    blocks = triton.cdiv(n, BLOCK_N)
    partial = x.new_empty(2, rows, blocks, dtype=wide)
    _mfd_loss_kernel[(rows * blocks,)](
        x,
        end_teacher,
        end_aux,
        span,
        weight,
        grad,
        partial,
        n,
        blocks,
        end_teacher.stride(0),
        end_aux.stride(0),
        x.numel(),
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    _mfd_loss_finish_kernel[(1,)](
        partial,
        span,
        weight,
        loss,
        distance,
        rows,
        blocks,
        x.numel(),
        BLOCK_R=FINISH_ROWS,
        BLOCK_P=FINISH_PARTS,
        num_warps=NUM_WARPS,
    )
    return loss, distance, grad
