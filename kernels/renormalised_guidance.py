"""Guidance that keeps a length, on lanes; the contract is ``ops/renormalised_guidance.py``.

v is read as [B, L, M, C].  A program has some rows of C in one sample and lane; those of lanes 0
and 1 are one program, which writes both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.dot import round_to

ELEMENTS = 2048  # of a program
NUM_WARPS = 4


@triton.jit
def _renormalised_guidance_kernel(
    v_ptr,  # [B, L, M, C]
    out_ptr,
    guidance,
    rows,  # M
    lanes,  # L
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = (tl.program_id(1) // (lanes - 1)).to(tl.int64)
    lane = tl.program_id(1) % (lanes - 1)  # 0: the teacher's two; else the lane after it
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (r < rows) & (c < C)
    at = ((sample * lanes + lane + (lane > 0).to(tl.int32)) * rows + r) * C + c
    v = tl.load(v_ptr + at, mask=mask, other=0.0)
    if lane == 0:
        second = at + tl.cast(rows, tl.int64) * C
        cond = v.to(tl.float32)
        uncond = tl.load(v_ptr + second, mask=mask, other=0.0).to(tl.float32)
        guided = uncond + guidance * (cond - uncond)
        length = tl.sqrt(tl.sum(cond * cond, axis=1, keep_dims=True))
        guided *= length / tl.sqrt(tl.sum(guided * guided, axis=1, keep_dims=True))
        v = round_to(guided, v.dtype)
        tl.store(out_ptr + second, v, mask=mask)
    tl.store(out_ptr + at, v, mask=mask)


def renormalised_guidance(v: Tensor, guidance: float) -> Tensor:
    """Launch the kernel.  Inputs are already validated by ``mfd_fast.ops``."""
    out = torch.empty_like(v)
    if v.numel() == 0:
        return out
    samples, lanes, channels = v.shape[0], v.shape[1], v.shape[-1]
    rows = v.numel() // (samples * lanes * channels)
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, ELEMENTS // block_c)
    _renormalised_guidance_kernel[(triton.cdiv(rows, block_r), samples * (lanes - 1))](
        v, out, guidance, rows, lanes, C=channels, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
