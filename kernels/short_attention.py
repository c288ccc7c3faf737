"""The attention of ``ops/short_attention.py`` and its gradient, for a GPU without nvcc.

A program has PAIRS (row, head) pairs, heads inside rows, each padded to 16 tokens: one tile of a
tensor core, multiplied pair by pair.  Scores and sums are fp32 (ieee for fp32 inputs); P and dS are
rounded to the model's dtype for their products, as eager PyTorch rounds P.

The gradient of the bias is summed by each program over its rows, then over programs in order: no
atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.column_sum import partition, sum_parts
from mfd_fast.kernels.dot import dot, round_to

TOKENS = tl.constexpr(16)  # of a tile
PAIR_ELEMENTS = 2048  # of one operand in a program; not measured on a GPU
NUM_WARPS = 4
PROGRAMS = 1056  # of a backward that sums the gradient of the bias; as in gated_residual
GROUPS = 16  # of those sums, each added up by itself first


@triton.jit
def _pairs(block, rows, heads, BLOCK_H: tl.constexpr, PAIRS: tl.constexpr):
    """(row, head, whether they exist) of the program's pairs in a block of rows, [PAIRS, 1, 1]."""
    pair = tl.arange(0, PAIRS)[:, None, None]
    row = block.to(tl.int64) * (PAIRS // BLOCK_H) + pair // BLOCK_H
    head = tl.program_id(1) * BLOCK_H + pair % BLOCK_H
    return row, head, (row < rows) & (head < heads)


@triton.jit
def _tile(ptr, row, head, strides, first, VECTOR: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers to columns first .. first + CHUNK of every token, ``[PAIRS, TOKENS, CHUNK]``."""
    t, d = tl.arange(0, TOKENS)[None, :, None], tl.arange(0, CHUNK)[None, None, :]
    at = row * strides[0] + t * strides[1] + head * strides[2]
    return ptr + (tl.multiple_of(at, (VECTOR, VECTOR, VECTOR)) + first + d)


@triton.jit
def _mask(exists, first, T: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    t, d = tl.arange(0, TOKENS)[None, :, None], tl.arange(0, CHUNK)[None, None, :]
    return exists & (t < T) & (first + d < D)


@triton.jit
def _load(
    ptr,
    row,
    head,
    exists,
    strides,
    first,
    T: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    mask = _mask(exists, first, T, D, CHUNK)
    return tl.load(_tile(ptr, row, head, strides, first, VECTOR, CHUNK), mask=mask, other=0.0)


@triton.jit
def _add_products(x, y, total):
    """total + x y^T of every pair, ``[PAIRS, TOKENS, TOKENS]``."""
    return dot(x, tl.permute(y, (0, 2, 1)), total)


@triton.jit
def _softmax(scores, bias_ptr, head, exists, strides, T: tl.constexpr):
    """softmax(scores + bias), 0 for keys that do not exist."""
    i, j = tl.arange(0, TOKENS)[None, :, None], tl.arange(0, TOKENS)[None, None, :]
    if bias_ptr is not None:
        at = head * strides[0] + i * strides[1] + j * strides[2]
        scores += tl.load(bias_ptr + at, mask=exists & (i < T) & (j < T), other=0.0)
    scores = tl.where(j < T, scores, float("-inf"))
    p = tl.exp(scores - tl.max(scores, axis=2, keep_dims=True))
    return p / tl.sum(p, axis=2, keep_dims=True)


@triton.jit
def _short_attention_kernel(
    q_ptr,  # [N, T, H, D] by strides
    k_ptr,
    v_ptr,
    bias_ptr,  # [H, T, T] fp32 by strides, or None
    out_ptr,  # [N, T, H, D] or, row-major, [N, H, T, D]
    q_strides,  # of rows, tokens and heads
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    rows,
    heads,
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that every stride is a multiple of
    BLOCK_H: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, head, exists = _pairs(tl.program_id(0), rows, heads, BLOCK_H, PAIRS)
    scores = tl.zeros([PAIRS, TOKENS, TOKENS], tl.float32)
    for first in range(0, D, CHUNK):
        q = _load(q_ptr, row, head, exists, q_strides, first, T, D, VECTOR, CHUNK)
        k = _load(k_ptr, row, head, exists, k_strides, first, T, D, VECTOR, CHUNK)
        scores = _add_products(q, k, scores)
    p = _softmax(scale * scores, bias_ptr, head, exists, bias_strides, T)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    p = round_to(p, dtype)
    for first in range(0, D, CHUNK):
        v = _load(v_ptr, row, head, exists, v_strides, first, T, D, VECTOR, CHUNK)
        out = dot(p, v, tl.zeros([PAIRS, TOKENS, CHUNK], tl.float32))
        at = _tile(out_ptr, row, head, out_strides, first, VECTOR, CHUNK)
        tl.store(at, round_to(out, dtype), mask=_mask(exists, first, T, D, CHUNK))


@triton.jit
def _store_gradients(at, mask, ds, p, q, k, grad, scale, part):
    """The gradients of q, k and v, ``part`` elements apart."""
    dtype: tl.constexpr = at.dtype.element_ty
    zero = tl.zeros(q.shape, tl.float32)
    tl.store(at, round_to(scale * dot(ds, k, zero), dtype), mask=mask)
    dk = scale * dot(tl.permute(ds, (0, 2, 1)), q, zero)
    tl.store(at + part, round_to(dk, dtype), mask=mask)
    dv = dot(tl.permute(p, (0, 2, 1)), grad, zero)
    tl.store(at + 2 * part, round_to(dv, dtype), mask=mask)


@triton.jit
def _store_sums(partial_ptr, total, heads, T: tl.constexpr, BLOCK_H: tl.constexpr):
    i, j = tl.arange(0, TOKENS)[None, :, None], tl.arange(0, TOKENS)[None, None, :]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
    partial_ptr += tl.program_id(0).to(tl.int64) * heads * T * T
    mask = (head < heads) & (i < T) & (j < T)
    tl.store(partial_ptr + head * T * T + i * T + j, total, mask=mask)


@triton.jit
def _short_attention_backward_kernel(
    grad_ptr,  # like out of the forward
    q_ptr,  # [N, T, H, D] by strides
    k_ptr,
    v_ptr,
    bias_ptr,  # [H, T, T] fp32 by strides, or None
    grad_qkv_ptr,  # [N, T, 3, H, D]
    partial_ptr,  # [parts, H, T, T] fp32, or None
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    rows,
    heads,
    each,  # blocks of rows of one part
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that every stride is a multiple of
    BLOCK_H: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    strides = (3 * T * heads * D, 3 * heads * D, D)
    square = tl.zeros([PAIRS, TOKENS, TOKENS], tl.float32)
    total = tl.zeros([BLOCK_H, TOKENS, TOKENS], tl.float32)
    for step in range(0, each):
        row, head, exists = _pairs(tl.program_id(0) * each + step, rows, heads, BLOCK_H, PAIRS)
        q = _load(q_ptr, row, head, exists, q_strides, 0, T, D, VECTOR, CHUNK)
        k = _load(k_ptr, row, head, exists, k_strides, 0, T, D, VECTOR, CHUNK)
        v = _load(v_ptr, row, head, exists, v_strides, 0, T, D, VECTOR, CHUNK)
        grad = _load(grad_ptr, row, head, exists, grad_strides, 0, T, D, VECTOR, CHUNK)
        scores, dp = _add_products(q, k, square), _add_products(grad, v, square)
        for first in range(CHUNK, D, CHUNK):
            q_more = _load(q_ptr, row, head, exists, q_strides, first, T, D, VECTOR, CHUNK)
            k_more = _load(k_ptr, row, head, exists, k_strides, first, T, D, VECTOR, CHUNK)
            scores = _add_products(q_more, k_more, scores)
            v_more = _load(v_ptr, row, head, exists, v_strides, first, T, D, VECTOR, CHUNK)
            grad_more = _load(grad_ptr, row, head, exists, grad_strides, first, T, D, VECTOR, CHUNK)
            dp = _add_products(grad_more, v_more, dp)
        p = _softmax(scale * scores, bias_ptr, head, exists, bias_strides, T)
        ds = p * (dp - tl.sum(p * dp, axis=2, keep_dims=True))
        if partial_ptr is not None:
            by_row = tl.reshape(ds, [PAIRS // BLOCK_H, BLOCK_H, TOKENS, TOKENS])
            total += tl.sum(by_row, axis=0)
        p, ds = round_to(p, q.dtype), round_to(ds, q.dtype)
        at = _tile(grad_qkv_ptr, row, head, strides, 0, VECTOR, CHUNK)
        mask = _mask(exists, 0, T, D, CHUNK)
        _store_gradients(at, mask, ds, p, q, k, grad, scale, heads * D)
        for first in range(CHUNK, D, CHUNK):
            q_more = _load(q_ptr, row, head, exists, q_strides, first, T, D, VECTOR, CHUNK)
            k_more = _load(k_ptr, row, head, exists, k_strides, first, T, D, VECTOR, CHUNK)
            grad_more = _load(grad_ptr, row, head, exists, grad_strides, first, T, D, VECTOR, CHUNK)
            at = _tile(grad_qkv_ptr, row, head, strides, first, VECTOR, CHUNK)
            mask = _mask(exists, first, T, D, CHUNK)
            _store_gradients(at, mask, ds, p, q_more, k_more, grad_more, scale, heads * D)
    if partial_ptr is not None:
        _store_sums(partial_ptr, total, heads, T, BLOCK_H)


def launch_shape(tokens: int, heads: int, width: int, itemsize: int) -> dict[str, int]:
    """Compile-time constants.

    fp32 matmuls hold their operands in registers: few pairs at once, in chunks of 16 columns.
    """
    block_d = max(16, triton.next_power_of_2(width))
    chunk = 16 if itemsize == 4 else min(32, block_d)
    pairs = max(1, 32 // block_d) if itemsize == 4 else PAIR_ELEMENTS // (16 * block_d)
    block_h = min(pairs, triton.next_power_of_2(heads))
    return {"T": tokens, "D": width, "BLOCK_H": block_h, "PAIRS": pairs, "CHUNK": chunk}


def _merged(tokens: int, heads: int, width: int, row_major: bool) -> tuple[int, int, int]:
    """Strides of rows, tokens and heads of the merged heads."""
    inner = (width, tokens * width) if row_major else (heads * width, width)
    return tokens * heads * width, *inner


def _grid(q: Tensor) -> tuple[int, int, dict[str, int]]:
    """(blocks of rows, blocks of heads, compile-time constants)."""
    rows, tokens, heads, width = q.shape
    shape = launch_shape(tokens, heads, width, q.element_size())
    block_r = shape["PAIRS"] // shape["BLOCK_H"]
    return triton.cdiv(rows, block_r), triton.cdiv(heads, shape["BLOCK_H"]), shape


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _vector(*tensors: Tensor, width: int) -> int:
    """Elements of a 16-byte access, if heads are whole ones: Triton looks for multiples of 16."""
    vector = 16 // tensors[0].element_size()
    strides = (stride for x in tensors for stride in x.stride()[:3])
    return vector if width % vector == 0 and all(s % vector == 0 for s in strides) else 1


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, row_major: bool, scale: float
) -> Tensor:
    """Launch the forward.  Inputs are already validated by ``mfd_fast.ops``."""
    rows, tokens, heads, width = q.shape
    out = q.new_empty((rows, tokens, heads * width))
    if out.numel() == 0:
        return out
    *grid, shape = _grid(q)
    _short_attention_kernel[tuple(grid)](
        q, k, v, bias, out, *map(_strides, (q, k, v, bias)),
        _merged(tokens, heads, width, row_major), rows, heads, float(scale),
        VECTOR=_vector(q, k, v, width=width), num_warps=NUM_WARPS, **shape,
    )  # fmt: skip
    return out


def short_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    row_major: bool,
    scale: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of q, k and v side by side and, ``with_bias``, of the bias (else empty)."""
    rows, tokens, heads, width = q.shape
    grad_qkv = q.new_empty((rows, tokens, 3, heads, width))
    bias_shape = (heads, tokens, tokens) if with_bias else (0,)
    if grad_qkv.numel() == 0:
        return grad_qkv, q.new_zeros(bias_shape, dtype=torch.float32)
    blocks, head_blocks, shape = _grid(q)
    # Heads in several chunks: with four warps some architectures keep a stack frame.
    warps = NUM_WARPS if width <= shape["CHUNK"] else 8 if q.element_size() == 4 else 2
    parts, each, partial = blocks, 1, None
    if with_bias:  # the parts past the last row are zeros
        parts, each = partition(1, blocks, PROGRAMS // head_blocks)
        parts = triton.cdiv(parts, GROUPS) * GROUPS
        partial = q.new_empty((GROUPS, parts // GROUPS, *bias_shape), dtype=torch.float32)
    _short_attention_backward_kernel[(parts, head_blocks)](
        grad, q, k, v, bias, grad_qkv, partial, _merged(tokens, heads, width, row_major),
        *map(_strides, (q, k, v, bias)), rows, heads, each, float(scale),
        VECTOR=_vector(q, k, v, width=width), num_warps=warps, **shape,
    )  # fmt: skip
    if partial is None:
        return grad_qkv, q.new_empty(bias_shape, dtype=torch.float32)
    return grad_qkv, sum_parts(sum_parts(partial)[None])[0]
