"""Low-rank adapters of some rows, forward and backward; the contract is ``ops/segmented_lora.py``.

    hidden[t, g, j]   = sum_c x[t, c] A[k, g, j, c]                        shrink
    y[t, g, n]       += scale sum_j hidden[t, g, j] B[k, g, n, j]          expand
    dh[t, g, j]       = scale sum_n dy[t, g, n] B[k, g, n, j]
    dx[t, c]          = sum_g sum_j dh[t, g, j] A[k, g, j, c]
    dA[k, g, j, c]    = sum over rows r of k, t of dh[t, g, j] x[t, c]
    dB[k, g, n, j]    = scale sum over rows r of k, t of dy[t, g, n] hidden[t, g, j]

The first four are one kernel with other strides, the last two another.  A program of a row without
an adapter returns at once, or, where the output has to be complete, copies y or writes zeros: which
rows have one is known to the device only.  hidden and dh are in the model's dtype, as PEFT's are.
Their sums are long and have few outputs: they are cut into parts, each of a program of its own,
which whichever program of a tile is last adds in order.  The gradients of A and B are summed over
rows and tokens in order by one program each.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.card import multiprocessors
from mfd_fast.kernels.dot import dot, round_to

NUM_WARPS = 4
NUM_STAGES = 3
PROGRAMS = 2  # of one row's shrink, for each multiprocessor.  docs/lab-notes.md.
ARRIVALS = 1 << 14  # counters: tiles of all rows of one launch
# Sums up to the largest rank make outputs as wide as a layer: wide tiles.
MAX_RANK = 256


def tiles(n: int, c: int, inner: int, itemsize: int) -> dict[str, int]:
    """Block sizes for outputs n wide and inner sums c long.  Not measured on a GPU.

    fp32 matmuls run without tensor cores and hold their operands in registers: smaller tiles; so
    do 128 columns of a sum in several steps, which spill in steps of 64.
    """
    block_t, block_n, block_c = (32, 32, 32) if itemsize == 4 else (64, 64, 64)
    if itemsize == 2 and c <= MAX_RANK:
        block_n = 128
        block_c = 64 if c * inner <= 64 else 32
    return {
        "BLOCK_T": block_t,
        "BLOCK_N": min(block_n, max(16, triton.next_power_of_2(n))),
        "BLOCK_C": min(block_c, max(16, triton.next_power_of_2(c))),
    }


def outer_tiles(m: int, n: int, itemsize: int) -> dict[str, int]:
    """Block sizes for sums over tokens of m x n products."""
    largest = 32 if itemsize == 4 else 64
    block_m, block_n = (min(largest, max(16, triton.next_power_of_2(side))) for side in (m, n))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_T": largest}


@triton.jit
def _arrive(counter_ptr, COUNT: tl.constexpr):
    """Whether the other COUNT - 1 programs have been here, whose stores can be read then.

    The counter is left as it was found, zero.
    """
    tl.debug_barrier()  # the stores of all threads come before the one that counts
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _add_parts(total, parts_ptr, counter_ptr, part, size, at, mask, SPLITS: tl.constexpr):
    """Whether all SPLITS parts of the tile are there, and then their sum in order."""
    tl.store(parts_ptr + part * size + at, total, mask=mask)
    is_last = _arrive(counter_ptr, SPLITS)
    if is_last:  # from L2: other multiprocessors wrote them
        total = tl.load(parts_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        for i in tl.static_range(1, SPLITS):
            total += tl.load(parts_ptr + i * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    return is_last, total


@triton.jit
def _segmented_matmul_kernel(
    x_ptr,  # [R, T, X_WIDTH]
    w_ptr,  # [K, outer groups, INNER, N, C], or [..., C, N] if FLIPPED
    base_ptr, out_ptr,  # [R, T, OUT_WIDTH]; base, which is added, or None
    parts_ptr,  # [SPLITS, R, T, OUT_WIDTH] fp32, or None if SPLITS = 1
    arrivals_ptr,  # int32 zeros, one for every tile, which are zeros again in the end; or None
    rows_ptr,  # [R] int32
    scale, tokens, adapters, w_adapter, w_outer, w_inner,
    N: tl.constexpr, C: tl.constexpr,  # columns of a group of the output, and of x
    INNER: tl.constexpr,  # groups that are summed
    X_WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr,
    X_OUTER: tl.constexpr,  # columns of x from one group of the output to the next
    FLIPPED: tl.constexpr, SPLITS: tl.constexpr,  # parts of the sum
    FILL: tl.constexpr,  # rows without an adapter are written too
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = INNER * ((C + BLOCK_C - 1) // BLOCK_C)
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    row = tl.program_id(2).to(tl.int64)
    group = tl.program_id(0) // tl.cdiv(N, BLOCK_N)
    columns = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) // SPLITS * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1) % SPLITS
    first = split * EACH
    x_ptr += row * tokens * X_WIDTH + group * X_OUTER
    mask = (t < tokens)[:, None] & (columns < N)[None, :]
    at = row * tokens * OUT_WIDTH + group * N + (t[:, None] * OUT_WIDTH + columns[None, :])
    adapter = tl.load(rows_ptr + row)
    if (adapter >= 0) & (adapter < adapters):
        w_ptr += adapter.to(tl.int64) * w_adapter + group.to(tl.int64) * w_outer
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for step in range(first, tl.minimum(first + EACH, STEPS)):
            part = step // tl.cdiv(C, BLOCK_C)
            c = step % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
            x_mask = (t < tokens)[:, None] & (c < C)[None, :]
            x_at = t[:, None] * X_WIDTH + (part * C + c)[None, :]
            x = tl.load(x_ptr + x_at, mask=x_mask, other=0.0)
            w_mask = (c < C)[:, None] & (columns < N)[None, :]
            w_at = c[:, None] * (N if FLIPPED else 1) + columns[None, :] * (1 if FLIPPED else C)
            w = tl.load(w_ptr + part.to(tl.int64) * w_inner + w_at, mask=w_mask, other=0.0)
            total = dot(x, round_to(w.to(tl.float32), x.dtype), total)
        is_complete = True
        if SPLITS > 1:
            tile = row * (tl.num_programs(1) // SPLITS) + tl.program_id(1) // SPLITS
            counter_ptr = arrivals_ptr + tile * tl.num_programs(0) + tl.program_id(0)
            is_complete, total = _add_parts(
                total, parts_ptr, counter_ptr, split,
                tl.num_programs(2).to(tl.int64) * tokens * OUT_WIDTH, at, mask, SPLITS,
            )  # fmt: skip
        if is_complete:
            total *= scale
            if base_ptr is not None:
                total += tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, round_to(total, out_ptr.dtype.element_ty), mask=mask)
    elif FILL:
        if base_ptr is not None:
            tl.store(out_ptr + at, tl.load(base_ptr + at, mask=mask, other=0.0), mask=mask)
        elif split == 0:
            zeros = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            tl.store(out_ptr + at, zeros.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _segmented_outer_kernel(
    p_ptr,  # [R, T, P_WIDTH]
    q_ptr,  # [R, T, Q_WIDTH]
    out_ptr,  # [K, G, M, N]
    rows_ptr,  # [R] int32
    scale,
    num_rows,
    tokens,
    M: tl.constexpr,
    N: tl.constexpr,
    P_GROUP: tl.constexpr,  # columns from one group to the next in p
    Q_GROUP: tl.constexpr,
    P_WIDTH: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i = tl.program_id(0) // tl.cdiv(N, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    adapter = tl.program_id(2)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in range(0, num_rows):
        if tl.load(rows_ptr + row) == adapter:
            first = tl.cast(row, tl.int64) * tokens
            p_row = p_ptr + first * P_WIDTH + group * P_GROUP
            q_row = q_ptr + first * Q_WIDTH + group * Q_GROUP
            for t0 in range(0, tokens, BLOCK_T):
                t = t0 + tl.arange(0, BLOCK_T)[:, None]
                p_mask = (t < tokens) & (i < M)[None, :]
                q_mask = (t < tokens) & (j < N)[None, :]
                p = tl.load(p_row + t * P_WIDTH + i[None, :], mask=p_mask, other=0.0)
                q = tl.load(q_row + t * Q_WIDTH + j[None, :], mask=q_mask, other=0.0)
                total = dot(tl.trans(p), q, total)
    out_ptr += (adapter.to(tl.int64) * tl.num_programs(1) + group) * M * N
    at = i[:, None] * N + j[None, :]
    value = round_to(total * scale, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, value, mask=(i < M)[:, None] & (j < N)[None, :])


def matmul_shape(n: int, c: int, inner: int, outer: int, x_width: int, *, itemsize: int) -> dict:
    """Compile-time sizes of a product; x of one group for all groups of the output is shared."""
    return {
        "N": n,
        "C": c,
        "INNER": inner,
        "X_OUTER": c if outer > 1 and x_width == outer * c else 0,
        "X_WIDTH": x_width,
        "OUT_WIDTH": outer * n,
    } | tiles(n, c, inner, itemsize)


def split(programs: int, shape: dict[str, int], wanted: int) -> int:
    """Parts of a sum of ``programs`` tiles of a row, so that ``wanted`` programs run, or fewer."""
    steps = shape["INNER"] * triton.cdiv(shape["C"], shape["BLOCK_C"])
    return triton.cdiv(steps, triton.cdiv(steps, max(1, wanted // programs)))


def outer_shape(m: int, n: int, p_width: int, q_width: int, groups: int, *, itemsize: int) -> dict:
    """Compile-time sizes of a sum over tokens of m x n products."""
    return {
        "M": m,
        "N": n,
        "P_GROUP": m if p_width == groups * m else 0,
        "Q_GROUP": n if q_width == groups * n else 0,
        "P_WIDTH": p_width,
        "Q_WIDTH": q_width,
    } | outer_tiles(m, n, itemsize)


@cache
def _arrivals(device: torch.device, stream: int) -> Tensor:
    """Zeros that every launch leaves as zeros; the launches of one stream follow each other.

    A captured graph keeps those of the stream that captured it, as it keeps cuBLAS's workspace: two
    such graphs may not run at the same time on two streams.
    """
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _matmul(
    x: Tensor,
    w: Tensor,  # [K, groups of the output, groups summed, n, c], or [..., c, n] if flipped
    out: Tensor,
    rows: Tensor,
    scale: float,
    *,
    base: Tensor | None = None,
    flipped: bool = False,
    fill: bool,
) -> Tensor:
    """out = base + scale x w^T on the rows with an adapter."""
    adapters, outer, inner, *sides = w.shape
    n, c = sides[::-1] if flipped else sides
    rows_, tokens, width = x.shape
    shape = matmul_shape(n, c, inner, outer, width, itemsize=x.element_size())
    tiles_n = outer * triton.cdiv(n, shape["BLOCK_N"])
    tiles_t = triton.cdiv(tokens, shape["BLOCK_T"])
    wanted = PROGRAMS * multiprocessors(x.device)
    is_whole = base is not None or tiles_n * tiles_t * rows_ > ARRIVALS
    splits = 1 if is_whole else split(tiles_n * tiles_t, shape, wanted)
    parts = arrivals = None
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        arrivals = _arrivals(x.device, _stream(x.device))
    _segmented_matmul_kernel[(tiles_n, tiles_t * splits, rows_)](
        x, w, base, out, parts, arrivals, rows, float(scale), tokens, adapters, *w.stride()[:3],
        FLIPPED=flipped, FILL=fill, SPLITS=splits,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES, **shape,
    )  # fmt: skip
    return out


def _outer(p: Tensor, q: Tensor, out: Tensor, rows: Tensor, scale: float) -> Tensor:
    """out[k, g] = scale * the sum over rows and tokens of p_g^T q_g; out is [K, G, M, N]."""
    adapters, groups, m, n = out.shape
    shape = outer_shape(m, n, p.shape[2], q.shape[2], groups, itemsize=p.element_size())
    grid = (triton.cdiv(m, shape["BLOCK_M"]) * triton.cdiv(n, shape["BLOCK_N"]), groups, adapters)
    _segmented_outer_kernel[grid](
        p, q, out, rows, float(scale), p.shape[0], p.shape[1],
        num_warps=NUM_WARPS, num_stages=NUM_STAGES, **shape,
    )  # fmt: skip
    return out


def _shrink(x: Tensor, a: Tensor, rows: Tensor, *, fill: bool) -> Tensor:
    hidden = x.new_empty((*x.shape[:2], a.shape[1] * a.shape[2]))
    return _matmul(x, a.unsqueeze(2), hidden, rows, 1.0, fill=fill)


def segmented_lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, scale: float) -> None:
    """Y in place.  Inputs are already validated by ``mfd_fast.ops``.

    More than one launch and allocation: every output reads the whole hidden, whose sum is cut into
    parts where one row would leave multiprocessors idle (:func:`split`).
    """
    if y.numel() == 0:
        return
    hidden = _shrink(x, a, rows, fill=False)
    _matmul(hidden, b.unsqueeze(2), y, rows, scale, base=y, fill=False)


def segmented_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, hidden).

    More than one launch and allocation, as of :func:`segmented_lora_`.
    """
    out = torch.empty_like(y)
    if y.numel() == 0:
        return out, x.new_zeros((*x.shape[:2], a.shape[1] * a.shape[2]))
    hidden = _shrink(x, a, rows, fill=True)
    return _matmul(hidden, b.unsqueeze(2), out, rows, scale, base=y, fill=True), hidden


def segmented_lora_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    scale: float,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x (empty unless ``need_x``), a and b in their own dtypes.

    More than one launch and allocation: each of the three is a product of its own shape, after one
    that all of them read.
    """
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_a, grad_b = a.new_empty(a.shape), b.new_empty(b.shape)
    if grad.numel() == 0:
        return grad_x.zero_(), grad_a.zero_(), grad_b.zero_()
    grad_hidden = _matmul(
        grad, b.unsqueeze(2), torch.empty_like(hidden), rows, scale, flipped=True, fill=False
    )
    if need_x:
        _matmul(grad_hidden, a.unsqueeze(1), grad_x, rows, 1.0, flipped=True, fill=True)
    _outer(grad_hidden, x, grad_a, rows, 1.0)
    _outer(grad, hidden, grad_b, rows, scale)
    return grad_x, grad_a, grad_b
