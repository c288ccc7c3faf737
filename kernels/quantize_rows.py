"""Rows in e4m3 with a float32 scale each; the contract is ``ops/quantize_rows.py``.

x [M, K], scale [M].  Needs compute capability 8.9.  A program holds its row in registers, so x is
read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.ops.reference import E4M3_MAX, E4M3_SMALLEST_ROW

# Elements of a row that a thread holds: two 16-byte accesses in bf16.  Other numbers were not
# tried: not measured on a GPU.
PER_THREAD = 16
MIN_ARCH = 89


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, K]
    values_ptr,  # [M, K] e4m3
    scale_ptr,  # [M] fp32
    columns,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), FLOOR)
    tl.store(scale_ptr + row, tl.math.div_rn(largest, LARGEST))
    values = x * tl.math.div_rn(LARGEST, largest)
    tl.store(values_ptr + row * columns + column, values.to(tl.float8e4nv), mask=mask)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel.  Inputs are already validated by ``mfd_fast.ops``.

    More than one allocation: values and scales have two dtypes.
    """
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    if x.numel() == 0:
        return values, scale
    block, num_warps = _tile(x.shape[-1])
    _quantize_rows_kernel[(scale.numel(),)](
        x,
        values,
        scale,
        x.shape[-1],
        LARGEST=E4M3_MAX,
        FLOOR=E4M3_SMALLEST_ROW,
        BLOCK=block,
        num_warps=num_warps,
    )
    return values, scale


def _tile(columns: int) -> tuple[int, int]:
    """Elements of a program and its warps."""
    block = triton.next_power_of_2(columns)
    return block, min(16, max(1, block // (32 * PER_THREAD)))
