"""ReLU linear attention in two kernels: the state of every head, then its product with the queries.

The contract is ``ops/linear_attention.py``.  Tokens are cut into S <= MAX_SPLITS ranges by their
number alone, so a row's result does not depend on the rows beside it.  One program sums one range
of one head into partial [R, H, S, D + 1, D]; the programs of the second kernel add the S partial
states in order (from L2).  No atomics: bitwise repeatable.  The partial states of SANA 1024px
(S = 2) add 6 % to the traffic, most of it in L2.

Sums are fp32.  One operand of every product is an input, exact in the tensor core; the other may be
the fp32 state, multiplied by ``dot_wide``: its error in bf16, 2^-17, is far below the 2^-9 of
rounding the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.dot import dot, dot_wide, round_to

# Ranges of tokens with their own partial state: one row of SANA 1024px is 70 heads x 2 programs for
# the 132 multiprocessors of an H100; more ranges cost more partial states.  Not measured on a GPU.
SPLIT_TOKENS = 512
MAX_SPLITS = 4
# Tokens of one program of the second kernel: as many as amortise reading the partial states.
APPLY_TOKENS = 256
NUM_STAGES = 3


def split_tokens(tokens: int) -> tuple[int, int]:
    """(number of ranges, tokens of a range)."""
    length = max(SPLIT_TOKENS, triton.cdiv(tokens, MAX_SPLITS))
    return max(1, triton.cdiv(tokens, length)), length


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
def load_state(
    partial_ptr,  # [S, D + 1, D] of one head
    row,  # index tensors that broadcast to the wanted tile: row of the state,
    column,  # its column
    mask,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The sum of the partial states, in order."""
    at = partial_ptr + row * D + column
    state = tl.load(at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        state += tl.load(at + split * (D + 1) * D, mask=mask, other=0.0)
    return state


@triton.jit
def _linear_attention_state_kernel(
    k_ptr,  # [R, T, H, D] by strides
    v_ptr,
    partial_ptr,  # [R, H, S, D + 1, D] fp32
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    heads,
    tokens,
    range_tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # row * heads + head
    split = tl.program_id(1)
    row, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_D)
    in_width = d[None, :] < D
    k_ptr += row * k_row + head * k_head
    v_ptr += row * v_row + head * v_head

    state = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)  # [value, key]
    keys = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    first = split * range_tokens
    last = tl.minimum(first + range_tokens, tokens)
    for t0 in range(first, last, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < last) & in_width
        k = relu(tl.load(k_ptr + t * k_token + d[None, :], mask=mask, other=0.0))
        v = tl.load(v_ptr + t * v_token + d[None, :], mask=mask, other=0.0)
        state = dot(tl.trans(v), k, state)
        keys += k.to(tl.float32)

    partial_ptr += (pair * tl.num_programs(1) + split) * (D + 1) * D
    tl.store(partial_ptr + d[:, None] * D + d[None, :], state, mask=(d[:, None] < D) & in_width)
    tl.store(partial_ptr + D * D + d, tl.sum(keys, axis=0), mask=d < D)


@triton.jit
def _linear_attention_apply_kernel(
    q_ptr,  # [R, T, H, D] by strides
    partial_ptr,  # [R, H, S, D + 1, D] fp32
    state_ptr,  # [R, H, D + 1, D] fp32: the sum; not written if S = 1
    out_ptr,  # [R, T, H, D]
    q_row,
    q_token,
    q_head,
    heads,
    tokens,
    apply_tokens,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_D)
    in_width = d[None, :] < D
    square = (d[:, None] < D) & in_width
    q_ptr += row * q_row + head * q_head
    out_ptr += (row * tokens * heads + head) * D
    partial_ptr += pair * SPLITS * (D + 1) * D

    # Transposed, [key, value]: the layout that the product with the queries wants.
    state = load_state(partial_ptr, d[None, :], d[:, None], square, D, SPLITS)
    keys = load_state(partial_ptr, D, d, d < D, D, SPLITS)
    if SPLITS > 1 and part == 0:
        state_ptr += pair * (D + 1) * D
        tl.store(state_ptr + d[None, :] * D + d[:, None], state, mask=square)
        tl.store(state_ptr + D * D + d, keys, mask=d < D)

    first = part * apply_tokens
    last = tl.minimum(first + apply_tokens, tokens)
    for t0 in range(first, last, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < last) & in_width
        q = relu(tl.load(q_ptr + t * q_token + d[None, :], mask=mask, other=0.0))
        norm = tl.sum(q.to(tl.float32) * keys[None, :], axis=1) + eps
        total = dot_wide(q, state, tl.zeros([BLOCK_T, BLOCK_D], tl.float32))
        out = total / norm[:, None]
        at = out_ptr + t.to(tl.int64) * heads * D + d[None, :]
        tl.store(at, round_to(out, out_ptr.dtype.element_ty), mask=mask)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch both kernels.  Inputs are already validated by ``mfd_fast.ops``.

    More than one launch and allocation: the state is complete before a query reads it.
    """
    rows, tokens, heads, width = q.shape
    out = q.new_empty((rows, tokens, heads * width))
    state = q.new_empty((rows, heads, width + 1, width), dtype=torch.float32)
    if out.numel() == 0:
        return out, state.zero_()
    splits, length = split_tokens(tokens)
    partial = state if splits == 1 else state.new_empty((rows, heads, splits, width + 1, width))
    shape = launch_shape(width, q.element_size())
    _linear_attention_state_kernel[(rows * heads, splits)](
        k, v, partial, *k.stride()[:3], *v.stride()[:3], heads, tokens, length,
        num_stages=NUM_STAGES, **shape,
    )  # fmt: skip
    parts = triton.cdiv(tokens, APPLY_TOKENS)
    _linear_attention_apply_kernel[(rows * heads, parts)](
        q, partial, state, out, *q.stride()[:3], heads, tokens, APPLY_TOKENS, float(eps),
        SPLITS=splits, num_stages=NUM_STAGES, **shape,
    )  # fmt: skip
    return out, state
