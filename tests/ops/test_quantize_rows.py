"""Rows in e4m3: exact where e4m3 is, else within its spacing; the Triton kernel's addresses."""

import pytest
import torch
from torch import Tensor

from mfd_fast.kernels import quantize_rows as kernel
from mfd_fast.ops import quantize_rows, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows and columns: one, ragged, SANA's hidden width, the widest.
SHAPES = [(1, 16), (5, 77), (3, 5600), (2, 8192)]
SIGNIFICANT = 2.0**-4  # half the spacing of e4m3 over its value
SUBNORMAL = 2.0**-10  # half the spacing below 2^-6
FLOAT32 = 2.0**-22  # roundings of the factor, the product and the scale


def representable(rows, columns, dtype, device="cpu"):
    """Values of e4m3 times a power of two a row, the largest among them; bits and powers."""
    bits = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    bits = torch.where(bits % 128 >= 126, 3, bits)  # NaN, and what is the largest
    bits[:, columns // 2] = torch.arange(rows, dtype=torch.uint8) % 2 * 128 + 126  # 448, -448
    powers = 2.0 ** torch.randint(-6, 7, (rows, 1))
    x = bits.view(torch.float8_e4m3fn).float() * powers
    assert torch.equal(x.to(dtype).float(), x)
    return tuple(y.to(device) for y in (x.to(dtype), bits, powers))


def assert_within_spacing(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """The bound of round to nearest, in float64."""
    scale, x = scale.double(), x.double()
    error = (values.double() * scale - x).abs()
    assert (error <= (SIGNIFICANT + FLOAT32) * x.abs() + SUBNORMAL * scale).all()
    assert values.double().abs().amax(-1).eq(448).all()  # the whole range is used


def test_every_value_of_e4m3_is_its_own_copy(device):
    bits = torch.arange(256, dtype=torch.uint8, device=device)
    bits = bits[bits % 128 != 127]
    values, scale = quantize_rows(bits.view(torch.float8_e4m3fn).float()[None])
    assert torch.equal(values.view(torch.uint8)[0], bits) and scale.item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_representable_rows_are_exact(shape, dtype, device):
    x, bits, powers = representable(*shape, dtype, device)
    values, scale = quantize_rows(x)
    assert torch.equal(values.view(torch.uint8), bits) and torch.equal(scale, powers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_finds_every_row_and_column(shape, dtype, triton_device):
    """On representable rows: the interpreter's cast to e4m3 loses the carry of other values."""
    x, bits, powers = representable(*shape, dtype, triton_device)
    values, scale = kernel.quantize_rows(x)
    assert torch.equal(values.view(torch.uint8), bits) and torch.equal(scale, powers)


def test_kernel_writes_nothing_behind_its_row(triton_device):
    x, bits, _ = representable(1, 77, torch.float32, triton_device)
    values = torch.ones(128, dtype=torch.uint8, device=triton_device).view(torch.float8_e4m3fn)
    scale = torch.empty(1, device=triton_device)
    constants = {"LARGEST": 448.0, "FLOOR": 1e-30, "BLOCK": 128}
    kernel._quantize_rows_kernel[(1,)](x, values, scale, 77, **constants)
    assert torch.equal(values.view(torch.uint8)[:77], bits[0])
    assert values.view(torch.uint8)[77:].eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_other_rows_are_within_the_spacing(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    assert_within_spacing(x, *quantize_rows(x))


def test_reference_divides_as_the_kernel_does(device):
    """Scale and factor are correctly rounded quotients; a reciprocal on the way would be an ulp off
    in a fifth of the rows, which values beside a tie of e4m3 show.
    """
    largest = 1 + torch.rand(500, 1)
    scale, factor = ((a / b).float() for a, b in ((largest.double(), 448), (448, largest.double())))
    ties = 17 / factor  # half way between 16 and 18
    x = torch.cat([largest, *(ties * (1 + k * 2.0**-24) for k in range(-6, 7))], dim=1)
    values, ours = reference.quantize_rows(x.to(device))
    assert torch.equal(ours.cpu(), scale)
    assert torch.equal(values.cpu().float(), (x * factor).to(torch.float8_e4m3fn).float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference_bit_for_bit(shape, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    expected, expected_scale = reference.quantize_rows(x)
    values, scale = kernel.quantize_rows(x)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("launch", [quantize_rows, kernel.quantize_rows])
@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-38, 1e38])
def test_extreme_rows_are_finite_and_do_not_disturb_others(launch, factor, triton_device):
    x = representable(3, 48, torch.float32, triton_device)[0]
    expected = launch(x)
    x[1] = x[1].sign() * factor
    values, scale = launch(x)
    back = values.float() * scale
    assert back.isfinite().all() and scale.gt(0).all()
    assert back[1].abs().max() <= factor * (1 + SIGNIFICANT)
    for row in (0, 2):
        assert torch.equal(back[row], (expected[0].float() * expected[1])[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays_so_in_a_product(bad, device):
    x = torch.randn(2, 16, device=device)
    x[0, 3] = bad
    values, scale = quantize_rows(x)
    sums = (values.float() @ torch.ones(16, device=device)) * scale[:, 0]
    assert sums[0].isnan() and sums[1].isfinite()


def test_leading_dimensions_and_no_rows(device):
    x = torch.randn(2, 3, 16, device=device)
    values, scale = quantize_rows(x)
    assert values.shape == x.shape and scale.shape == (2, 3, 1)
    assert quantize_rows(x[:0])[1].shape == (0, 3, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    x = torch.randn(4, 24, device=device).to(dtype)
    torch.library.opcheck(torch.ops.mfd_fast.quantize_rows.default, (x,))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(16), r"x must be \[..., K\]; got \[16\]"),
        (torch.zeros(2, 8193), "1 to 8192 channels; got 8193"),
        (torch.zeros(16, 2).t(), "x must be contiguous"),
        (torch.zeros(2, 16).double(), "float32, bfloat16 or float16; got torch.float64"),
    ],
)
def test_errors_name_what_was_expected_and_got(x, message):
    with pytest.raises(ValueError, match="^quantize_rows: .*" + message):
        quantize_rows(x)
