"""Gate + bias + residual and its gradients; the contract is ``ops/gated_residual.py``.

x, y are read as [S, M, C]: S samples, M rows of one sample, C channels.  The gradient to x is grad
itself: no kernel.  Where the gate's gradient is wanted, each of about PROGRAMS programs leaves
2 * 4 * BLOCK_C bytes of partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.column_sum import compute_dtype, finish, partition, sum_parts

# 256 columns: 2240 = 8.75 * 256 wastes 3 % of the lanes where 1024 would waste 27 %, and a row of a
# tile is 512 contiguous bytes in bf16.  16 rows share the tile's gate.  Not measured on a GPU.
BLOCK_C = 256
TILE = 4096
NUM_WARPS = 8
# Programs of a backward pass that sums rows: eight for each of an H100's 132 multiprocessors.
PROGRAMS = 1056


@triton.jit
def _columns(BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gate and bias are loaded for every row of the tile (from L1): as [1, BLOCK_C] they would get
    a layout of their own, and the compiler would move x and y through shared memory to meet it."""
    return tl.broadcast_to(tl.arange(0, BLOCK_C)[None, :], [BLOCK_R, BLOCK_C])


@triton.jit
def _gated_residual_kernel(
    x_ptr,  # [S, M, C]
    y_ptr,  # [S, M, C]
    gate_ptr,  # [S, C]
    bias_ptr,  # [C] or None
    out_ptr,  # [S, M, C]
    rows,  # M
    tiles,  # of BLOCK_R rows in one sample
    gate_stride,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    sample = (pid // (tiles * BLOCKS)).to(tl.int64)
    c = (pid % BLOCKS) * BLOCK_C + _columns(BLOCK_R, BLOCK_C)
    r = (pid // BLOCKS % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    mask = (r < rows) & (c < C)
    offset = (sample * rows + r) * C + c
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(WIDE)
    y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(WIDE)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + sample * gate_stride + c, mask=c < C, other=0.0).to(WIDE)
    tl.store(out_ptr + offset, (x + gate * y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_residual_backward_kernel(
    grad_ptr,  # [S, M, C]
    y_ptr,  # [S, M, C] or None
    gate_ptr,  # [S, C]
    bias_ptr,  # [C] or None
    grad_y_ptr,  # [S, M, C]
    partial_ptr,  # [S, P, 2, C] or None: sums of grad * (y + bias) and of grad
    rows,  # M
    parts,  # P
    tiles,  # of BLOCK_R rows in one part
    gate_stride,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    part = (pid // BLOCKS).to(tl.int64)  # over all samples
    sample = part // parts
    c = (pid % BLOCKS) * BLOCK_C + _columns(BLOCK_R, BLOCK_C)
    gate = tl.load(gate_ptr + sample * gate_stride + c, mask=c < C, other=0.0).to(WIDE)
    bias = tl.zeros([BLOCK_R, BLOCK_C], dtype=WIDE)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(WIDE)
    if partial_ptr is not None:
        sum_a = tl.zeros([BLOCK_R, BLOCK_C], dtype=WIDE)
        sum_b = tl.zeros([BLOCK_R, BLOCK_C], dtype=WIDE)

    for tile in range(0, tiles):
        r = (part % parts * tiles + tile) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        mask = (r < rows) & (c < C)
        offset = (sample * rows + r) * C + c
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(WIDE)
        tl.store(grad_y_ptr + offset, (grad * gate).to(grad_y_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            sum_b += grad
            if y_ptr is not None:
                y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(WIDE)
                sum_a += grad * (y + bias)

    if partial_ptr is not None:
        column = (pid % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
        base = partial_ptr + part * 2 * C + column
        tl.store(base, tl.sum(sum_a, axis=0), mask=column < C)
        tl.store(base + C, tl.sum(sum_b, axis=0), mask=column < C)


def _tile(channels: int) -> tuple[int, int]:
    block_c = min(BLOCK_C, triton.next_power_of_2(channels))
    return TILE // block_c, block_c


def _wide(x: Tensor):
    return tl.float64 if compute_dtype(x) == torch.float64 else tl.float32


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the forward kernel.  Inputs are already validated by ``mfd_fast.ops``."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    channels = x.shape[-1]
    samples = gate.shape[0]
    rows = x.numel() // (samples * channels)
    block_r, block_c = _tile(channels)
    tiles = triton.cdiv(rows, block_r)
    _gated_residual_kernel[(samples * tiles * triton.cdiv(channels, block_c),)](
        x,
        y,
        gate,
        bias,
        out,
        rows,
        tiles,
        gate.stride(0),
        C=channels,
        WIDE=_wide(x),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )
    return out


def _grad_y_and_sums(
    grad: Tensor, y: Tensor | None, gate: Tensor, bias: Tensor | None, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    samples, channels = gate.shape
    grad_y = torch.empty_like(grad)
    if grad.numel() == 0:
        zeros = grad.new_zeros(samples, 2, channels, dtype=compute_dtype(grad))
        return grad_y, zeros if with_sums else None
    rows = grad.numel() // (samples * channels)
    block_r, block_c = _tile(channels)
    blocks = triton.cdiv(channels, block_c)
    tiles = triton.cdiv(rows, block_r)
    parts, each = partition(samples, tiles, PROGRAMS // blocks) if with_sums else (tiles, 1)
    partial = None
    if with_sums:
        partial = grad.new_empty(samples, parts, 2, channels, dtype=compute_dtype(grad))
    _gated_residual_backward_kernel[(samples * parts * blocks,)](
        grad,
        y,
        gate,
        bias,
        grad_y,
        partial,
        rows,
        parts,
        each,
        gate.stride(0),
        C=channels,
        WIDE=_wide(grad),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )
    return grad_y, None if partial is None else sum_parts(partial)


def gated_residual_backward(
    grad: Tensor, y: Tensor | None, gate: Tensor, bias: Tensor | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to y, gate (empty without y) and bias (empty without bias or ``with_sums``)."""
    grad_y, sums = _grad_y_and_sums(grad, y, gate, bias, with_sums)
    has_gate = with_sums and y is not None
    has_bias = with_sums and bias is not None
    grad_gate = gate.new_empty(gate.shape if has_gate else 0)
    grad_bias = gate.new_empty(0) if not has_bias else torch.empty_like(bias)
    if sums is not None:
        finish(
            sums,
            first=grad_gate if has_gate else None,
            total=grad_bias if has_bias else None,
            weight=gate,
            plane=1,
        )
    return grad_y, grad_gate, grad_bias
