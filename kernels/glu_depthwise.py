"""The depthwise unit of ``ops/glu_depthwise.py`` and its gradient, for a GPU without nvcc.

A program has BLOCK_C channels of both halves and COLUMNS columns of the image, and walks down some
rows.  A thread owns whole channels: every pixel is a tensor of its own, the sums of two unfinished
rows stay in registers, and no value goes to another thread.  A row is activated COLUMNS + 2 pixels
wide (COLUMNS + 4 in the backward, which convolves twice): what neighbours share comes from L2.

In 16 bits two sigmoids share a reciprocal, 1/a = b / (a b): the special-function unit is the limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfd_fast.kernels.dot import INTERPRETED, round_to

COLUMNS = 4
NUM_WARPS = 1
LANE_BYTES = {False: 4, True: 2}  # of channels to a thread: the backward has two sets of sums
SCHEDULERS = 528  # of an H100's 132 multiprocessors: warps that can issue in one clock
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _sigmoids(x, y, PAIRED: tl.constexpr):
    """x, y and their sigmoids.  Paired, what is below -41.5 counts as -41.5 (SiLU: 4e-17)."""
    if PAIRED:
        x = tl.maximum(x, -41.5, propagate_nan=tl.PropagateNan.ALL)
        y = tl.maximum(y, -41.5, propagate_nan=tl.PropagateNan.ALL)
    a = 1.0 + tl.exp2(x * -LOG2E)
    b = 1.0 + tl.exp2(y * -LOG2E)
    if PAIRED:
        inverse = _reciprocal(a * b)
        return x, y, b * inverse, a * inverse
    else:
        return x, y, _reciprocal(a), _reciprocal(b)


@triton.jit
def _load_pair(ptr, at, mask, C: tl.constexpr):
    """A value and its gate, C channels apart, in fp32."""
    value = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return value, tl.load(ptr + C + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_taps(weight_ptr, c, C: tl.constexpr):
    """Nine weights of the values and nine of the gates."""
    values, gates = (), ()
    for tap in tl.static_range(9):
        value, gate = _load_pair(weight_ptr + tap, 9 * c, c < C, 9 * C)
        values, gates = values + (value,), gates + (gate,)  # noqa: RUF005  (as Triton knows it)
    return values, gates


@triton.jit
def _place(height, width, segments, rows, C: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr):
    """(sample, channels, first column, first row, row after the last) of this program."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    strips = tl.cdiv(width, N)
    c = pid % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = pid // (TILES * strips) % segments * rows
    sample = (pid // (TILES * strips * segments)).to(tl.int64)
    return sample, c, pid // TILES % strips * N, begin, tl.minimum(begin + rows, height)


@triton.jit
def _where(inside, c, C: tl.constexpr):
    """The mask of the channels of a pixel, all off unless it is ``inside``."""
    return c < tl.where(inside, C, 0)


@triton.jit
def _slope(x, sigmoid):
    """SiLU'.  A shared reciprocal leaves 1 an ulp short, which a larger x would multiply."""
    x = tl.minimum(x, 41.5, propagate_nan=tl.PropagateNan.ALL)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _activate(x_ptr, in_bias, sample, y, first, height, width, c, C: tl.constexpr, N: tl.constexpr):
    """SiLU of N pixels of row y, zero outside the image, and its slope: (values, gates) each."""
    PAIRED: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    values, gates, slopes, gate_slopes = (), (), (), ()
    for k in tl.static_range(N):
        inside = (y >= 0) & (y < height) & (first + k >= 0) & (first + k < width)
        at = ((sample * height + y) * width + first + k) * 2 * C + c
        mask = _where(inside, c, C)
        if in_bias is None:
            v, g = _load_pair(x_ptr, at, mask, C)
        else:  # what is outside the image cancels the bias: SiLU(0) = 0
            outside = round_to(-in_bias[0], x_ptr.dtype.element_ty)
            v = tl.load(x_ptr + at, mask=mask, other=outside).to(tl.float32) + in_bias[0]
            outside = round_to(-in_bias[1], x_ptr.dtype.element_ty)
            g = tl.load(x_ptr + C + at, mask=mask, other=outside).to(tl.float32) + in_bias[1]
        v, g, sigmoid_v, sigmoid_g = _sigmoids(v, g, PAIRED)
        values = values + (v * sigmoid_v,)  # noqa: RUF005
        gates = gates + (g * sigmoid_g,)  # noqa: RUF005
        slopes = slopes + (_slope(v, sigmoid_v),)  # noqa: RUF005
        gate_slopes = gate_slopes + (_slope(g, sigmoid_g),)  # noqa: RUF005
    return (values, gates), (slopes, gate_slopes)


@triton.jit
def _add_row(line, taps, sums, ROW: tl.constexpr, MIRRORED: tl.constexpr, N: tl.constexpr):
    """sums[n] + row ROW of the filter on line[n], line[n + 1], line[n + 2], for both halves."""
    values, gates = (), ()
    for n in tl.static_range(N):
        value, gate = sums[0][n], sums[1][n]
        for j in tl.static_range(3):
            value += taps[0][3 * ROW + (2 - j if MIRRORED else j)] * line[0][n + j]
            gate += taps[1][3 * ROW + (2 - j if MIRRORED else j)] * line[1][n + j]
        values, gates = values + (value,), gates + (gate,)  # noqa: RUF005
    return values, gates


@triton.jit
def _repeat(pair, N: tl.constexpr):
    values, gates = (), ()
    for _ in tl.static_range(N):
        values, gates = values + (pair[0],), gates + (pair[1],)  # noqa: RUF005
    return values, gates


@triton.jit
def _gates(zs, PAIRED: tl.constexpr, N: tl.constexpr):
    """(zs, their sigmoids), two by two; N is even."""
    gates, sigmoids = (), ()
    for n in tl.static_range(0, N, 2):
        g, h, sigmoid_g, sigmoid_h = _sigmoids(zs[n], zs[n + 1], PAIRED)
        gates, sigmoids = gates + (g, h), sigmoids + (sigmoid_g, sigmoid_h)  # noqa: RUF005
    return gates, sigmoids


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
):
    PAIRED: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    sample, c, first, begin, end = _place(height, width, segments, rows, C, BLOCK_C, N)
    taps = _load_taps(weight_ptr, c, C)
    bias = _repeat(_load_pair(bias_ptr, c, c < C, C), N)
    in_bias = None
    if in_bias_ptr is not None:
        in_bias = _load_pair(in_bias_ptr, c, c < C, C)
    above, here = bias, bias  # what lacks the row below, and its own row as well
    for y in range(begin - 1, end + 1):
        line, _ = _activate(x_ptr, in_bias, sample, y, first - 1, height, width, c, C, N + 2)
        values, zs = _add_row(line, taps, above, 2, False, N)
        above = _add_row(line, taps, here, 1, False, N)
        here = _add_row(line, taps, bias, 0, False, N)
        gates, sigmoids = _gates(zs, PAIRED, N)
        for n in tl.static_range(N):
            out = round_to(values[n] * gates[n] * sigmoids[n], out_ptr.dtype.element_ty)
            at = ((sample * height + y - 1) * width + first + n) * C + c
            tl.store(out_ptr + at, out, mask=_where((y > begin) & (first + n < width), c, C))


@triton.jit
def _store_pair(ptr, at, value, gate, mask, C: tl.constexpr):
    tl.store(ptr + at, round_to(value, ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + C + at, round_to(gate, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_depthwise_backward_kernel(
    grad_ptr,  # [R, height * width, C]
    x_ptr,  # [R, height * width, 2 C]
    weight_ptr,  # [2 C, 9]
    bias_ptr,  # [2 C]
    in_bias_ptr,  # [2 C] or None
    grad_x_ptr,  # like x
    grad_conv_ptr,  # like x, or None
    height,
    width,
    segments,
    rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N: tl.constexpr,
):
    PAIRED: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    M: tl.constexpr = N + 2  # columns of the convolution z and of its gradient dz
    sample, c, first, begin, end = _place(height, width, segments, rows, C, BLOCK_C, N)
    taps = _load_taps(weight_ptr, c, C)
    bias = _repeat(_load_pair(bias_ptr, c, c < C, C), M)
    in_bias = None
    if in_bias_ptr is not None:
        in_bias = _load_pair(in_bias_ptr, c, c < C, C)
    zero = tl.zeros([BLOCK_C], tl.float32)
    zeros = _repeat((zero, zero), N)
    z_above, z_here = bias, bias
    da_above, da_here = zeros, zeros
    slope_2, slope_1 = zeros, zeros  # of rows y - 2 and y - 1
    for y in range(begin - 2, end + 2):
        # Row y of the activations finishes row y - 1 of z, and so of dz,
        line, slopes = _activate(x_ptr, in_bias, sample, y, first - 2, height, width, c, C, N + 4)
        values, zs = _add_row(line, taps, z_above, 2, False, M)
        z_above = _add_row(line, taps, z_here, 1, False, M)
        z_here = _add_row(line, taps, bias, 0, False, M)
        gates, sigmoids = _gates(zs, PAIRED, M)
        dz_v, dz_g = (), ()
        for k in tl.static_range(M):
            inside = (y >= 1) & (y <= height) & (first + k >= 1) & (first + k <= width)
            at = (sample * height + y - 1) * width + first + k - 1
            grad = tl.load(grad_ptr + at * C + c, mask=_where(inside, c, C), other=0.0)
            grad = grad.to(tl.float32)
            value, gate = grad * gates[k] * sigmoids[k], grad * values[k]
            gate *= _slope(gates[k], sigmoids[k])
            dz_v = dz_v + (tl.where(inside, value, 0.0),)  # noqa: RUF005
            dz_g = dz_g + (tl.where(inside, gate, 0.0),)  # noqa: RUF005
            if grad_conv_ptr is not None and k >= 1 and k <= N:
                mask = _where(inside & (y > begin) & (y <= end), c, C)
                _store_pair(grad_conv_ptr, at * 2 * C + c, value, gate, mask, C)
        # which finishes row y - 2 of the result.
        da = _add_row((dz_v, dz_g), taps, da_above, 0, True, N)
        da_above = _add_row((dz_v, dz_g), taps, da_here, 1, True, N)
        da_here = _add_row((dz_v, dz_g), taps, zeros, 2, True, N)
        for n in tl.static_range(N):
            at = ((sample * height + y - 2) * width + first + n) * 2 * C + c
            mask = _where((y >= begin + 2) & (first + n < width), c, C)
            value, gate = da[0][n] * slope_2[0][n], da[1][n] * slope_2[1][n]
            _store_pair(grad_x_ptr, at, value, gate, mask, C)
        slope_2, slope_1 = slope_1, (slopes[0][2 : N + 2], slopes[1][2 : N + 2])


def launch_shape(channels: int, itemsize: int, *, backward: bool) -> dict[str, int]:
    """Compile-time constants: LANE_BYTES of channels to a thread, one at least."""
    lane = max(1, LANE_BYTES[backward] // itemsize)
    return {"C": channels, "BLOCK_C": 32 * NUM_WARPS * lane, "N": COLUMNS}


def segment_rows(columns: int, height: int, halo: int) -> int:
    """Rows of a walk, so that the busiest scheduler of ``columns`` walks has the fewest rows."""

    def cost(rows: int) -> int:
        programs = columns * triton.cdiv(height, rows)
        return triton.cdiv(programs, SCHEDULERS) * (rows + 2 * halo)

    return min((triton.cdiv(height, n) for n in range(1, height + 1)), key=cost)


def _grid(x: Tensor, height: int, width: int, *, backward: bool) -> tuple[int, int, dict]:
    """(programs, rows of a segment, compile-time constants)."""
    shape = launch_shape(x.shape[2] // 2, x.element_size(), backward=backward)
    columns = x.shape[0] * triton.cdiv(shape["C"], shape["BLOCK_C"]) * triton.cdiv(width, COLUMNS)
    rows = segment_rows(columns, height, 2 if backward else 1)
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
