"""ReLU linear attention: one program sums the state of a head, then reads it with the queries.

The contract is ``ops/linear_attention.py``.  One row of SANA 1.6B is 70 programs for the 132
multiprocessors of an H200, whose loads are in flight together: counted, they wait less than the
memory does (docs/lab-notes.md).  A sum runs over the tokens in order: a row's result is bitwise
repeatable and does not depend on the rows beside it.

Sums are fp32.  One operand of every product is an input, exact in the tensor core; the other may be
the fp32 state, multiplied by ``dot_wide``: its error in bf16, 2^-17, is far below the 2^-9 of
rounding the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.dot import dot, dot_wide, round_to

NUM_STAGES = 3
FORWARD_TOKENS = 128  # at once
FORWARD_WARPS = 8


def launch_shape(width: int, itemsize: int, block_t: int = 64) -> dict[str, int]:
    """Compile-time constants and warps for a head width; tl.dot wants sides of 16 at least.

    fp32 matmuls run without tensor cores and hold their operands in registers: few tokens at once.
    """
    block = max(16, width)
    return {
        "D": width,
        "BLOCK_D": block,
        "BLOCK_T": block_t if itemsize == 2 else 16,
        "num_warps": 8 if block == 64 else 4,
    }


@triton.jit
def relu(x):
    """Not max(x, 0): a NaN stays one."""
    wide = x.to(tl.float32)
    return tl.where(wide < 0, 0.0, wide).to(x.dtype)


@triton.jit
def _linear_attention_kernel(
    q_ptr,  # [R, T, H, D] by strides
    k_ptr,
    v_ptr,
    state_ptr,  # [R, H, D + 1, D] fp32
    out_ptr,  # [R, T, H, D]
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    heads,
    tokens,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # row * heads + head
    row, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_D)
    in_width = d[None, :] < D
    q_ptr += row * q_row + head * q_head
    k_ptr += row * k_row + head * k_head
    v_ptr += row * v_row + head * v_head
    state_ptr += pair * (D + 1) * D
    out_ptr += (row * tokens * heads + head) * D

    state = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)  # [value, key]
    sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for t0 in range(0, tokens, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < tokens) & in_width
        k = relu(tl.load(k_ptr + t * k_token + d[None, :], mask=mask, other=0.0))
        v = tl.load(v_ptr + t * v_token + d[None, :], mask=mask, other=0.0)
        state = dot(tl.trans(v), k, state)
        sums += k.to(tl.float32)
    keys = tl.sum(sums, axis=0)
    tl.store(state_ptr + d[:, None] * D + d[None, :], state, mask=(d[:, None] < D) & in_width)
    tl.store(state_ptr + D * D + d, keys, mask=d < D)

    flipped = tl.trans(state)  # [key, value]
    for t0 in range(0, tokens, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < tokens) & in_width
        q = relu(tl.load(q_ptr + t * q_token + d[None, :], mask=mask, other=0.0))
        norm = tl.sum(q.to(tl.float32) * keys[None, :], axis=1) + eps
        total = dot_wide(q, flipped, tl.zeros([BLOCK_T, BLOCK_D], tl.float32))
        out = total / norm[:, None]
        at = out_ptr + t.to(tl.int64) * heads * D + d[None, :]
        tl.store(at, round_to(out, out_ptr.dtype.element_ty), mask=mask)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel.  Inputs are already validated by ``mfd_fast.ops``.

    More than one allocation: the state has another shape and dtype than out.
    """
    rows, tokens, heads, width = q.shape
    out = q.new_empty((rows, tokens, heads * width))
    state = q.new_empty((rows, heads, width + 1, width), dtype=torch.float32)
    if out.numel() == 0:
        return out, state.zero_()
    shape = launch_shape(width, q.element_size(), FORWARD_TOKENS)
    if q.element_size() == 2:
        shape["num_warps"] = FORWARD_WARPS
    _linear_attention_kernel[(rows * heads,)](
        q, k, v, state, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, tokens,
        float(eps), num_stages=NUM_STAGES, **shape,
    )  # fmt: skip
    return out, state
