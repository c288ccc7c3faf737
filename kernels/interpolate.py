"""Noising and the flow-matching target in one pass; the contract is ``ops/interpolate.py``.

Samples are [B, N] (N: all other dimensions), t is [B] float32 on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 2048 elements over 8 warps: one 16-byte access per thread and operand in bf16, two in fp32.  Other
# sizes were not tried: not measured on a GPU.
BLOCK_N = 2048
NUM_WARPS = 8


@triton.jit
def _interpolate_kernel(
    x0_ptr,  # [B, N]
    noise_ptr,  # [B, N]
    t_ptr,  # [B] fp32
    x_t_ptr,  # [B, N]
    target_ptr,  # [B, N] or None
    n,
    blocks,  # of BLOCK_N elements in one sample
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)  # B * N overflows int32 for large batches of latents
    column = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < n
    offset = row * n + column

    t = tl.load(t_ptr + row).to(WIDE)
    x0 = tl.load(x0_ptr + offset, mask=mask).to(WIDE)
    noise = tl.load(noise_ptr + offset, mask=mask).to(WIDE)
    x_t = (1 - t) * x0 + t * noise
    tl.store(x_t_ptr + offset, x_t.to(x_t_ptr.dtype.element_ty), mask=mask)
    if target_ptr is not None:
        target = (noise - x0).to(target_ptr.dtype.element_ty)
        tl.store(target_ptr + offset, target, mask=mask)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor, with_target: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel.  Inputs are already validated by ``mfd_fast.ops``.

    More than one allocation where the target is wanted too: both are the caller's to keep.
    """
    x_t = torch.empty_like(x0)
    target = torch.empty_like(x0) if with_target else x0.new_empty(0)
    if x0.numel() == 0:
        return x_t, target
    n = x0.numel() // x0.shape[0]
    blocks = triton.cdiv(n, BLOCK_N)
    _interpolate_kernel[(x0.shape[0] * blocks,)](
        x0,
        noise,
        t,
        x_t,
        target if with_target else None,
        n,
        blocks,
        WIDE=tl.float64 if x0.dtype == torch.float64 else tl.float32,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    return x_t, target
