"""The depthwise unit of ``ops/glu_depthwise.py`` and its gradient.

A program has BLOCK_C channels of both halves and COLUMNS columns of the image, and walks down some
rows.  A thread owns whole channels: every pixel is a tensor of its own, the sums of two unfinished
rows stay in registers, and no value goes to another thread.  A row is activated COLUMNS + 2 pixels
wide (COLUMNS + 4 in the backward, which convolves twice): what neighbours share comes from L2.

What limits it is instructions.  So in 16 bits SiLU(x) = h + h tanh(h) with h = x / 2, one call of
the special-function unit to 2^-11 (of h: at very negative x, where SiLU is next to 0, what is left
is an error of 2^-11 |h| in place of a relative one), and what enters a SiLU is halved beforehand:
x and its bias two channels at a time and rounded as PyTorch rounds their sum, the gates through
their weights.  The last programs of a row of tiles overlap instead of having a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.card import multiprocessors
from mfd_fast.kernels.dot import INTERPRETED, round_to

COLUMNS = 8
NUM_WARPS = 1
LANE_BYTES = {False: 4, True: 2}  # of channels to a thread: the backward has two sets of sums
SCHEDULERS = 4  # of a multiprocessor: warps that can issue in one clock
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    """To 2^-11, as the special-function unit has it; interpreted, rounded to as few digits."""
    if INTERPRETED:
        y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
        bits = (y.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _silu(x, FAST: tl.constexpr):
    """SiLU of x; FAST, of 2 x."""
    if FAST:
        return x + x * _tanh(x)
    else:
        return x * (1.0 / (1.0 + tl.exp2(x * -LOG2E)))


@triton.jit
def _slope(x, UNIT: tl.constexpr, FAST: tl.constexpr):
    """SiLU' of x; FAST, 2 UNIT SiLU' of 2 x."""
    if FAST:
        y = _tanh(x)
        part = UNIT * y
        return part + UNIT + x * (UNIT - part * y)
    else:  # where a sigmoid is an ulp short of 1, a larger x would multiply what is lacking
        x = tl.minimum(x, 41.5, propagate_nan=tl.PropagateNan.ALL)
        y = 1.0 / (1.0 + tl.exp2(x * -LOG2E))
        return y * (1.0 + x * (1.0 - y))


@triton.jit
def _half_sum(x, half):
    """x / 2 + half of pairs in fp32, rounded to their 16-bit type before."""
    if INTERPRETED:
        return round_to(x.to(tl.float32) * 0.5 + half.to(tl.float32), x.dtype).to(tl.float32)
    elif x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{.reg .b32 y, z; mov.b32 y, 0x3f003f00; fma.rn.bf16x2 y, $2, y, $3;"
            "shl.b32 z, y, 16; mov.b32 $0, z; and.b32 z, y, 0xffff0000; mov.b32 $1, z;}",
            "=f,=f,r,r", [x, half], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 y; .reg .b16 a, b; mov.b32 y, 0x38003800; fma.rn.f16x2 y, $2, y, $3;"
            "mov.b32 {a, b}, y; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}",
            "=f,=f,r,r", [x, half], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _mask(c, inside, C: tl.constexpr):
    """Of the channels of a pixel; only a tile wider than C has lanes to switch off."""
    if c.shape[0] > C:
        return c < tl.where(inside, C, 0)
    else:
        return tl.full(c.shape, 1, tl.int1) & inside


@triton.jit
def _load_pair(ptr, c, C: tl.constexpr, SCALE: tl.constexpr = 1.0, STEP: tl.constexpr = 1):
    """A value and its gate times SCALE, in fp32."""
    mask = _mask(c, True, C)
    value = tl.load(ptr + STEP * c, mask=mask).to(tl.float32)
    return value, tl.load(ptr + STEP * (C + c), mask=mask).to(tl.float32) * SCALE


@triton.jit
def _load_taps(weight_ptr, c, C: tl.constexpr, SCALE: tl.constexpr):
    """Nine weights of the values and nine of the gates."""
    values, gates = (), ()
    for tap in tl.static_range(9):
        value, gate = _load_pair(weight_ptr + tap, c, C, SCALE, 9)
        values, gates = values + (value,), gates + (gate,)  # noqa: RUF005  (as Triton knows it)
    return values, gates


@triton.jit
def _place(height, width, segments, rows, C: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr):
    """(sample, channels, first column, first row, row after the last) of this program."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    LAST: tl.constexpr = C - BLOCK_C if C > BLOCK_C else 0
    pid = tl.program_id(0)
    strips = tl.cdiv(width, N)
    tile = tl.minimum(pid % TILES * BLOCK_C, LAST)
    c = tl.multiple_of(tile, (LAST | BLOCK_C) & -(LAST | BLOCK_C)) + tl.arange(0, BLOCK_C)
    begin = pid // (TILES * strips) % segments * rows
    sample = (pid // (TILES * strips * segments)).to(tl.int64)
    return sample, c, pid // TILES % strips * N, begin, tl.minimum(begin + rows, height)


@triton.jit
def _load_line(
    x_ptr, bias_ptr, inside, first, width, c,
    C: tl.constexpr, N: tl.constexpr, HALO: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """N pixels of both halves plus bias, in 16 bits halved, from column ``first`` of a row.

    Zero where the row is not ``inside`` the image, for HALO columns at either end (unless EVEN, for
    all) where the column is not: what lies there cancels the bias.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    FAST: tl.constexpr = tl.float32 != DTYPE
    halves = ()
    for half in tl.static_range(2):
        bias = tl.zeros(c.shape, tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + half * C + c, mask=_mask(c, True, C)).to(tl.float32)
        outside = round_to(-bias, DTYPE)
        halved = round_to(bias * 0.5, DTYPE) if PAIRS else bias * 0.5
        line = ()
        for k in tl.static_range(N):
            keep = inside
            if not EVEN or k < HALO:
                keep = keep & (first + k >= 0)
            if not EVEN or k >= N - HALO:
                keep = keep & (first + k < width)
            x = tl.load(x_ptr + (2 * k + half) * C + c, mask=_mask(c, keep, C), other=outside)
            if PAIRS:
                x = _half_sum(x, halved)
            elif FAST:
                x = x.to(tl.float32) * 0.5 + halved
            else:
                x = x + bias
            line = line + (x,)  # noqa: RUF005
        halves = halves + (line,)  # noqa: RUF005
    return halves


@triton.jit
def _add_row(line, taps, sums, ROW: tl.constexpr, MIRRORED: tl.constexpr, N: tl.constexpr):
    """sums[n] + row ROW of the filter on line[n], line[n + 1], line[n + 2], for both halves."""
    halves = ()
    for half in tl.static_range(2):
        row = ()
        for n in tl.static_range(N):
            new = sums[half][n]
            for j in tl.static_range(3):
                tap = taps[half][3 * ROW + (2 - j if MIRRORED else j)]
                new = tl.fma(tap, line[half][n + j], new)
            row = row + (new,)  # noqa: RUF005
        halves = halves + (row,)  # noqa: RUF005
    return halves


@triton.jit
def _repeat(pair, N: tl.constexpr):
    values, gates = (), ()
    for _ in tl.static_range(N):
        values, gates = values + (pair[0],), gates + (pair[1],)  # noqa: RUF005
    return values, gates


@triton.jit
def _silus(line, FAST: tl.constexpr, N: tl.constexpr):
    values, gates = (), ()
    for n in tl.static_range(N):
        values = values + (_silu(line[0][n], FAST),)  # noqa: RUF005
        gates = gates + (_silu(line[1][n], FAST),)  # noqa: RUF005
    return values, gates


@triton.jit
def _slopes(line, FAST: tl.constexpr, N: tl.constexpr):
    """SiLU' of all but two pixels at either end."""
    values, gates = (), ()
    for n in tl.static_range(2, N - 2):
        values = values + (_slope(line[0][n], 0.5, FAST),)  # noqa: RUF005
        gates = gates + (_slope(line[1][n], 0.5, FAST),)  # noqa: RUF005
    return values, gates


@triton.jit
def _put_row(
    out_ptr, zs, inside, first, width, c,
    C: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    for n in tl.static_range(N):
        out = round_to(zs[0][n] * _silu(zs[1][n], FAST), out_ptr.dtype.element_ty)
        keep = inside if EVEN else inside & (first + n < width)
        tl.store(out_ptr + n * C + c, out, mask=_mask(c, keep, C))


@triton.jit
def _glu_depthwise_kernel(
    x_ptr,  # [R, height * width, 2 C]
    weight_ptr,  # [2 C, 9]
    bias_ptr,  # [2 C]
    in_bias_ptr,  # [2 C] or None
    out_ptr,  # [R, height * width, C]
    height,
    width,
    segments,
    rows,  # of a segment
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N: tl.constexpr,
    EVEN: tl.constexpr,  # whether N divides the width
):
    FAST: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    HALF: tl.constexpr = 0.5 if FAST else 1.0
    sample, c, first, begin, end = _place(height, width, segments, rows, C, BLOCK_C, N)
    taps = _load_taps(weight_ptr, c, C, HALF)
    bias = _repeat(_load_pair(bias_ptr, c, C, HALF), N)
    above, here = bias, bias  # what lacks the row below, and its own row as well
    for y in range(tl.maximum(begin - 1, 0), tl.minimum(end + 1, height)):
        row = (sample * height + y) * width + first
        line = _load_line(
            x_ptr + (row - 1) * 2 * C, in_bias_ptr, True, first - 1, width, c,
            C, N + 2, 1, EVEN, FAST,
        )  # fmt: skip
        line = _silus(line, FAST, N + 2)
        zs = _add_row(line, taps, above, 2, False, N)
        above = _add_row(line, taps, here, 1, False, N)
        here = _add_row(line, taps, bias, 0, False, N)
        row -= width
        _put_row(out_ptr + row * C, zs, y > begin, first, width, c, C, N, EVEN, FAST)
    row = (sample * height + height - 1) * width + first
    if end == height:
        _put_row(out_ptr + row * C, above, True, first, width, c, C, N, EVEN, FAST)


@triton.jit
def _gate_gradient(grad_ptr, value, z, inside, c, C: tl.constexpr, FAST: tl.constexpr):
    """To a value and to its gate z; doubled for the gate where its weights are halved."""
    grad = tl.load(grad_ptr + c, mask=_mask(c, inside, C), other=0.0).to(tl.float32)
    return grad * _silu(z, FAST), grad * value * _slope(z, 1.0, FAST)


@triton.jit
def _store_pair(ptr, value, gate, mask, C: tl.constexpr):
    tl.store(ptr, round_to(value, ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + C, round_to(gate, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_depthwise_backward_kernel(
    grad_ptr,  # [R, height * width, C]
    x_ptr,  # [R, height * width, 2 C]
    weight_ptr,  # [2 C, 9]
    bias_ptr,  # [2 C]
    in_bias_ptr,  # [2 C] or None
    grad_x_ptr,  # like x
    grad_conv_ptr,  # like x, or None
    height, width, segments, rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    FAST: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    HALF: tl.constexpr = 0.5 if FAST else 1.0
    M: tl.constexpr = N + 2  # columns of the convolution z and of its gradient dz
    sample, c, first, begin, end = _place(height, width, segments, rows, C, BLOCK_C, N)
    taps = _load_taps(weight_ptr, c, C, HALF)
    bias = _repeat(_load_pair(bias_ptr, c, C, HALF), M)
    zero = tl.zeros([BLOCK_C], tl.float32)
    zeros = _repeat((zero, zero), N)
    z_above, z_here = bias, bias
    da_above, da_here = zeros, zeros
    slope_2, slope_1 = zeros, zeros  # of rows y - 2 and y - 1
    for y in range(tl.maximum(begin - 2, 0), end + 2):
        # Row y of the activations finishes row y - 1 of z, and so of dz,
        row = (sample * height + y) * width + first
        line = _load_line(
            x_ptr + (row - 2) * 2 * C, in_bias_ptr, y < height, first - 2, width, c,
            C, N + 4, 2, EVEN, False,
        )  # fmt: skip
        slopes = _slopes(line, FAST, N + 4)
        line = _silus(line, FAST, N + 4)
        values, zs = _add_row(line, taps, z_above, 2, False, M)
        z_above = _add_row(line, taps, z_here, 1, False, M)
        z_here = _add_row(line, taps, bias, 0, False, M)
        row -= width + 1
        dz = ((), ())
        for k in tl.static_range(M):
            inside = (y >= 1) & (y <= height)
            if not EVEN or k == 0:
                inside = inside & (first + k >= 1)
            if not EVEN or k == M - 1:
                inside = inside & (first + k <= width)
            one = _gate_gradient(grad_ptr + (row + k) * C, values[k], zs[k], inside, c, C, FAST)
            dz = dz[0] + (one[0],), dz[1] + (one[1],)
            if grad_conv_ptr is not None and k >= 1 and k <= N:
                inside = inside & (y > begin) & (y <= end)
                to = grad_conv_ptr + (row + k) * 2 * C + c
                _store_pair(to, one[0], one[1] * HALF, _mask(c, inside, C), C)
        # which finishes row y - 2 of the result.
        da = _add_row(dz, taps, da_above, 0, True, N)
        da_above = _add_row(dz, taps, da_here, 1, True, N)
        da_here = _add_row(dz, taps, zeros, 2, True, N)
        row += 1 - width
        for n in tl.static_range(N):
            inside = y >= begin + 2 if EVEN else (y >= begin + 2) & (first + n < width)
            mask = _mask(c, inside, C)
            value, gate = da[0][n] * slope_2[0][n], da[1][n] * slope_2[1][n]
            _store_pair(grad_x_ptr + (row + n) * 2 * C + c, value, gate, mask, C)
        slope_2, slope_1 = slope_1, slopes


def launch_shape(channels: int, itemsize: int, width: int, *, backward: bool) -> dict[str, int]:
    """Compile-time constants: LANE_BYTES of channels to a thread, one at least."""
    lane = max(1, LANE_BYTES[backward] // itemsize)
    even = width % COLUMNS == 0
    return {"C": channels, "BLOCK_C": 32 * NUM_WARPS * lane, "N": COLUMNS, "EVEN": even}


def segment_rows(columns: int, height: int, halo: int, schedulers: int) -> int:
    """Rows of a walk, so that the busiest scheduler of ``columns`` walks has the fewest rows."""

    def cost(rows: int) -> int:
        programs = columns * triton.cdiv(height, rows)
        return triton.cdiv(programs, schedulers) * (rows + 2 * halo)

    return min((triton.cdiv(height, n) for n in range(1, height + 1)), key=cost)


def _grid(x: Tensor, height: int, width: int, *, backward: bool) -> tuple[int, int, dict]:
    """(programs, rows of a segment, compile-time constants)."""
    shape = launch_shape(x.shape[2] // 2, x.element_size(), width, backward=backward)
    columns = x.shape[0] * triton.cdiv(shape["C"], shape["BLOCK_C"]) * triton.cdiv(width, COLUMNS)
    schedulers = SCHEDULERS * multiprocessors(x.device)
    rows = segment_rows(columns, height, 2 if backward else 1, schedulers)
    return columns * triton.cdiv(height, rows), rows, shape


def glu_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, in_bias: Tensor | None, height: int, width: int
) -> Tensor:
    """Launch the forward.  Inputs are already validated by ``mfd_fast.ops``."""
    out = x.new_empty((*x.shape[:2], x.shape[2] // 2))
    if out.numel() == 0:
        return out
    programs, rows, shape = _grid(x, height, width, backward=False)
    _glu_depthwise_kernel[(programs,)](
        x, weight, bias, in_bias, out, height, width, triton.cdiv(height, rows), rows,
        num_warps=NUM_WARPS, **shape,
    )  # fmt: skip
    return out


def glu_depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    in_bias: Tensor | None,
    height: int,
    width: int,
    with_conv: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients to x and, ``with_conv``, to the convolution's result (else empty)."""
    grad_x = torch.empty_like(x)
    grad_conv = torch.empty_like(x) if with_conv else x.new_empty(0)
    if x.numel() == 0:
        return grad_x, grad_conv
    programs, rows, shape = _grid(x, height, width, backward=True)
    _glu_depthwise_backward_kernel[(programs,)](
        grad, x, weight, bias, in_bias, grad_x, grad_conv if with_conv else None,
        height, width, triton.cdiv(height, rows), rows, num_warps=NUM_WARPS, **shape,
    )  # fmt: skip
    return grad_x, grad_conv
