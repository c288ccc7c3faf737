"""(Residual +) row norm + gain + modulation per sample (+ SiLU): forward of three operators.

    xhat = (x - mean) * rstd
    z    = xhat * gain * (1 + scale_s) + shift_s
    y    = z, or z * sigmoid(z)

x may be the end of a residual branch, x + gate_s * (branch + bias), which is written too (stream)
and normed as it is written: a pass over x less than one after the other.

    KIND "layer"  mean and 1 / sqrt(var + eps) of the row (population variance)
    KIND "rms"    mean = 0, 1 / sqrt(mean(x^2) + eps)
    KIND "l2"     mean = 0, sqrt(C) / max(|x|_2, eps)

x is [S, M, C]: S samples, M rows of one sample (lanes and tokens together), C channels; scale and
shift are [S, C] with any row stride, gain is [C]; each of the three may be None.  Statistics are
float32 (float64 for float64) and are written for the backward pass.  Gate is like scale, bias like
gain.

Traffic: 1 read and 1 write of x, 2 of each with a residual.  Whole rows stay in registers, so x is
read once and the variance is still computed in two passes.  The backward pass is in
``norm_modulate_backward.py``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.column_sum import compute_dtype
from mfd_fast.kernels.dot import round_to

# A warp holds a whole row as CHUNKS tiles of 32 lanes x 16 bytes: SANA's 2240 bf16 channels are 9
# chunks of 256, 3 % of them idle, and sums over channels are shuffles.  One tile of 4096 would idle
# 45 % and, counted in sm_90 machine code, take 720 clocks to issue where an H100 moves the row in
# about 680; the chunks take 290.  Neither is measured on a GPU.
VECTOR_BYTES = 16
# Elements of a row that a thread may hold, by the float32 values it holds for each; the warps of a
# program are doubled until its rows fit.  Chosen by what ptxas fits into 255 registers.
ROW_ELEMENTS = {1: 80, 2: 72, 4: 32}


@triton.jit
def load_row(ptr, c, C: tl.constexpr, WIDE: tl.constexpr):
    """A chunk of modulation or gain, in float32 or wider."""
    return tl.load(ptr + c, mask=c < C, other=0.0).to(WIDE)


@triton.jit
def load_factor(gain_ptr, scale_ptr, c, C: tl.constexpr, WIDE: tl.constexpr):
    """A chunk of gain * (1 + scale)."""
    factor = tl.full(c.shape, 1.0, dtype=WIDE)
    if scale_ptr is not None:
        factor += load_row(scale_ptr, c, C, WIDE)
    if gain_ptr is not None:
        factor *= load_row(gain_ptr, c, C, WIDE)
    return factor


@triton.jit
def row_sum(xs, CHUNKS: tl.constexpr):
    """The sum over all chunks of each row, [BLOCK_R, 1]."""
    total = xs[0]
    for i in tl.static_range(1, CHUNKS):
        total += xs[i]
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def row_dot(xs, ys, CHUNKS: tl.constexpr):
    total = xs[0] * ys[0]
    for i in tl.static_range(1, CHUNKS):
        total += xs[i] * ys[i]
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def _subtract(xs, mean, columns, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr):
    """x - mean in the C channels, 0 outside them."""
    ys = ()
    for i in tl.static_range(CHUNKS):
        y = xs[i] - mean
        if (i + 1) * BLOCK_C > C:
            y = tl.where(i * BLOCK_C + columns < C, y, 0.0)
        ys = ys + (y,)  # noqa: RUF005
    return ys


@triton.jit
def _load_stream(
    x_ptr,
    branch_ptr,
    gate_ptr,
    bias_ptr,
    stream_ptr,
    at,
    c,
    mask,
    C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A chunk of x, or of x + gate * (branch + bias) as it is stored."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(WIDE)
    if branch_ptr is not None:
        y = tl.load(branch_ptr + at, mask=mask, other=0.0).to(WIDE)
        if bias_ptr is not None:
            y += load_row(bias_ptr, c, C, WIDE)
        if gate_ptr is not None:
            y *= load_row(gate_ptr, c, C, WIDE)
        stream = round_to(x + y, stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + at, stream, mask=mask)
        x = stream.to(WIDE)
    return x


@triton.jit
def norm_modulate_kernel(
    x_ptr,  # [S, M, C]
    branch_ptr,  # [S, M, C] or None
    gate_ptr,  # [S, C] or None
    bias_ptr,  # [C] or None
    stream_ptr,  # [S, M, C], or None without branch
    scale_ptr, shift_ptr,  # [S, C] or None
    gain_ptr,  # [C] or None
    y_ptr,  # [S, M, C]
    mean_ptr,  # [S, M], or None unless KIND is "layer"
    rstd_ptr,  # [S, M]
    rows, tiles,  # M, and tiles of BLOCK_R rows in one sample
    gate_stride, scale_stride, shift_stride,
    C: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr, SILU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = rstd_ptr.dtype.element_ty
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    r = (pid % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    row = sample * rows + r
    # Modulation is loaded for every row of the tile (from L1): as [1, BLOCK_C] it would get its own
    # layout, and the compiler would move x through shared memory to meet it.
    columns = tl.broadcast_to(tl.arange(0, BLOCK_C)[None, :], [BLOCK_R, BLOCK_C])
    if scale_ptr is not None:
        scale_ptr += sample * scale_stride
    if gate_ptr is not None:
        gate_ptr += sample * gate_stride

    xs = ()
    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_C + columns
        mask = (r < rows) & (c < C)
        x = _load_stream(
            x_ptr, branch_ptr, gate_ptr, bias_ptr, stream_ptr, row * C + c, c, mask, C, WIDE
        )
        xs = xs + (x,)  # noqa: RUF005  (Triton knows tuple addition, not unpacking)
    if KIND == "layer":
        mean = row_sum(xs, CHUNKS) / C
        xs = _subtract(xs, mean, columns, C, BLOCK_C, CHUNKS)
        # The mean's own rounding, which counts where it is far larger than the deviation.
        rest = row_sum(xs, CHUNKS) / C
        xs = _subtract(xs, rest, columns, C, BLOCK_C, CHUNKS)
        tl.store(mean_ptr + row, mean + rest, mask=r < rows)
    total = row_dot(xs, xs, CHUNKS)
    if KIND == "l2":
        rstd = C**0.5 / tl.maximum(tl.sqrt(total), EPS)
    else:
        rstd = 1.0 / tl.sqrt(total / C + EPS)
    tl.store(rstd_ptr + row, rstd, mask=r < rows)

    for i in tl.static_range(CHUNKS):
        c = i * BLOCK_C + columns
        z = xs[i] * rstd * load_factor(gain_ptr, scale_ptr, c, C, WIDE)
        if shift_ptr is not None:
            z += load_row(shift_ptr + sample * shift_stride, c, C, WIDE)
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        mask = (r < rows) & (c < C)
        tl.store(y_ptr + row * C + c, z.to(y_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    rows: int  # of one program
    columns: int  # of one chunk
    chunks: int
    num_warps: int


def choose_tile(channels: int, itemsize: int, num_held: int) -> Tile:
    """The tile of a kernel that holds ``num_held`` values for each element of its tile."""
    columns = min(32 * VECTOR_BYTES // itemsize, triton.next_power_of_2(channels))
    words = max(itemsize, 4) // 4  # registers of a value
    warps = 1
    while triton.cdiv(channels, columns * warps) * columns > 32 * ROW_ELEMENTS[num_held] // words:
        warps *= 2
    columns *= warps
    chunks = triton.cdiv(channels, columns)
    elements = (1024 if num_held < 4 else 512) // words  # of a warp, if its rows are narrow
    rows = 1 << max(1, elements // (columns * chunks)).bit_length() - 1
    if num_held == 4 and warps < 4:  # four warps share a partial sum
        rows, warps = rows * 4 // warps, 4
    return Tile(rows, columns, chunks, warps)


def row_stride(row: Tensor | None) -> int:
    return 0 if row is None else row.stride(0)


class Residual(NamedTuple):
    """What is added to x before the norm: ``gate_s * (branch + bias)``."""

    branch: Tensor | None = None  # like x
    gate: Tensor | None = None  # [S, C]
    bias: Tensor | None = None  # [C]


NONE = Residual()


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    residual: Residual = NONE,
    *,
    eps: float,
    kind: str,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, stream); mean is empty unless "layer", stream without a residual."""
    channels = x.shape[-1]
    y = torch.empty_like(x)
    stream = x.new_empty(0) if residual.branch is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=compute_dtype(x))
    mean = torch.empty_like(rstd) if kind == "layer" else rstd.new_empty(0)
    if x.numel() == 0:
        return y, mean, rstd, stream
    samples = 1 if scale is None else scale.shape[0]
    rows = rstd.numel() // samples
    tile = choose_tile(channels, x.itemsize, 1)
    tiles = triton.cdiv(rows, tile.rows)
    norm_modulate_kernel[(samples * tiles,)](
        x, *residual, None if residual.branch is None else stream, scale, shift, gain, y,
        mean if kind == "layer" else None, rstd, rows, tiles,
        *map(row_stride, (residual.gate, scale, shift)),
        C=channels, EPS=eps, KIND=kind, SILU=silu,
        BLOCK_R=tile.rows, BLOCK_C=tile.columns, CHUNKS=tile.chunks, num_warps=tile.num_warps,
    )  # fmt: skip
    return y, mean, rstd, stream
