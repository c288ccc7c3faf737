"""Gradients of ReLU linear attention in two kernels: grad_q and the state's gradient, then k and v.

    c_t    = g_t . out_t,    n_t = state[D] q'_t + eps           q' = relu(q), k' = relu(k)
    dq'_t  = (state[:D]^T g_t - c_t state[D]) / n_t
    dstate = sum_t [g_t; -c_t] (q'_t / n_t)^T                    [D + 1, D] fp32 per head
    dk'_t  = dstate^T [v_t; 1],    dv_t = dstate[:D] k'_t

g is the gradient of out.  1 / n_t is multiplied into q' and not into g: where q' is zero, g / n_t
is 1e15 g.  out is computed again from q and the state.  The accuracy of the products is that of
``linear_attention``.  Tokens are cut into S <= MAX_SPLITS ranges by their number alone; one program
sums one range of one head into partial [R, H, S, D + 1, D], and the programs of the second kernel
add the S partial states in order (from L2): no atomics, bitwise repeatable.  The partial states of
SANA 1024px (S = 2) add 6 % to the traffic, most of it in L2.

Traffic: reads q, k, v, g once and writes three gradients, 7 R T H D elements.
"""

import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.dot import dot_wide, round_to
from mfd_fast.kernels.linear_attention import NUM_STAGES, launch_shape, relu

# Ranges of tokens with their own partial state: one row of SANA 1024px is 70 heads x 2 programs for
# the 132 multiprocessors of an H100; more ranges cost more partial states.  Not measured on a GPU.
SPLIT_TOKENS = 512
MAX_SPLITS = 4
# Tokens of one program of the second kernel: as many as amortise reading the partial states.
APPLY_TOKENS = 256
# Tokens at once in the first kernel: its five tiles fill the registers with twice as many, and with
# the widest heads already where they wait for loads under way (sm_80, sm_120).
GRAD_Q_TOKENS = 32
WIDEST = 64


def split_tokens(tokens: int) -> tuple[int, int]:
    """(number of ranges, tokens of a range)."""
    length = max(SPLIT_TOKENS, triton.cdiv(tokens, MAX_SPLITS))
    return max(1, triton.cdiv(tokens, length)), length


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
def _linear_attention_grad_q_kernel(
    grad_ptr,  # [R, T, H, D]
    q_ptr,  # [R, T, H, D] by strides
    state_ptr,  # [R, H, D + 1, D] fp32
    grad_q_ptr,  # [R, T, 3, H, D], the first of the three
    partial_ptr,  # [R, H, S, D + 1, D] fp32: dstate
    q_row,
    q_token,
    q_head,
    heads,
    tokens,
    range_tokens,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_D)
    in_width = d[None, :] < D
    square = (d[:, None] < D) & in_width
    q_ptr += row * q_row + head * q_head
    grad_ptr += (row * tokens * heads + head) * D
    grad_q_ptr += (row * tokens * 3 * heads + head) * D
    state_ptr += pair * (D + 1) * D
    state = tl.load(state_ptr + d[:, None] * D + d[None, :], mask=square, other=0.0)
    flipped = tl.load(state_ptr + d[None, :] * D + d[:, None], mask=square, other=0.0)
    keys = tl.load(state_ptr + D * D + d, mask=d < D, other=0.0)

    dstate = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    dkeys = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    first = split * range_tokens
    last = tl.minimum(first + range_tokens, tokens)
    for t0 in range(first, last, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < last) & in_width
        step = t.to(tl.int64) * heads * D
        raw = tl.load(q_ptr + t * q_token + d[None, :], mask=mask, other=0.0)
        g = tl.load(grad_ptr + step + d[None, :], mask=mask, other=0.0)
        q = relu(raw)
        wide = q.to(tl.float32)
        inverse = (1.0 / (tl.sum(wide * keys[None, :], axis=1) + eps))[:, None]
        out = dot_wide(q, flipped, tl.zeros([BLOCK_T, BLOCK_D], tl.float32)) * inverse
        c = tl.sum(g.to(tl.float32) * out, axis=1)[:, None]
        dq = dot_wide(g, state, -c * keys[None, :]) * inverse
        dq = round_to(tl.where(raw.to(tl.float32) <= 0, 0.0, dq), grad_q_ptr.dtype.element_ty)
        tl.store(grad_q_ptr + step * 3 + d[None, :], dq, mask=mask)
        scaled = wide * inverse
        dstate = dot_wide(tl.trans(g), scaled, dstate)
        dkeys -= c * scaled

    partial_ptr += (pair * tl.num_programs(1) + split) * (D + 1) * D
    tl.store(partial_ptr + d[:, None] * D + d[None, :], dstate, mask=square)
    tl.store(partial_ptr + D * D + d, tl.sum(dkeys, axis=0), mask=d < D)


@triton.jit
def _linear_attention_grad_kv_kernel(
    k_ptr,  # [R, T, H, D] by strides
    v_ptr,
    partial_ptr,  # [R, H, S, D + 1, D] fp32: dstate
    grad_ptr,  # [R, T, 3, H, D]: grad_q (written before), grad_k, grad_v
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    heads,
    tokens,
    apply_tokens,
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
    k_ptr += row * k_row + head * k_head
    v_ptr += row * v_row + head * v_head
    grad_ptr += (row * tokens * 3 * heads + head) * D
    partial_ptr += pair * SPLITS * (D + 1) * D
    dstate = load_state(partial_ptr, d[:, None], d[None, :], square, D, SPLITS)
    flipped = load_state(partial_ptr, d[None, :], d[:, None], square, D, SPLITS)
    dkeys = load_state(partial_ptr, D, d, d < D, D, SPLITS)

    first = part * apply_tokens
    last = tl.minimum(first + apply_tokens, tokens)
    for t0 in range(first, last, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < last) & in_width
        raw = tl.load(k_ptr + t * k_token + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + t * v_token + d[None, :], mask=mask, other=0.0)
        zeros = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        dk = tl.where(raw.to(tl.float32) <= 0, 0.0, dot_wide(v, dstate, zeros + dkeys[None, :]))
        dv = dot_wide(relu(raw), flipped, zeros)
        at = grad_ptr + (t.to(tl.int64) * 3 + 1) * heads * D + d[None, :]
        tl.store(at, round_to(dk, grad_ptr.dtype.element_ty), mask=mask)
        tl.store(at + heads * D, round_to(dv, grad_ptr.dtype.element_ty), mask=mask)


def linear_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, eps: float
) -> Tensor:
    """Launch both kernels.  Inputs are already validated by ``mfd_fast.ops``.

    More than one launch and allocation: a sum over all tokens, then what every token takes of it.
    """
    rows, tokens, heads, width = q.shape
    out = q.new_empty((rows, tokens, 3, heads, width))
    if out.numel() == 0:
        return out
    splits, length = split_tokens(tokens)
    partial = state.new_empty((rows, heads, splits, width + 1, width))
    shape = launch_shape(width, q.element_size(), GRAD_Q_TOKENS)
    _linear_attention_grad_q_kernel[(rows * heads, splits)](
        grad, q, state, out, partial, *q.stride()[:3], heads, tokens, length, float(eps),
        num_stages=1 if width == WIDEST else NUM_STAGES, **shape,
    )  # fmt: skip
    shape = launch_shape(width, q.element_size())
    parts = triton.cdiv(tokens, APPLY_TOKENS)
    _linear_attention_grad_kv_kernel[(rows * heads, parts)](
        k, v, partial, out, *k.stride()[:3], *v.stride()[:3], heads, tokens, APPLY_TOKENS,
        SPLITS=splits, num_stages=NUM_STAGES, **shape,
    )  # fmt: skip
    return out
