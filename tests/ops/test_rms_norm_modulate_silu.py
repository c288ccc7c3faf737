"""OccFM's RMS norm + modulation + SiLU: the operator and its Triton kernels against float64."""

import pytest
import torch
import torch.nn.functional as F

from mfd_fast.kernels import rms_norm_modulate_silu as kernel
from mfd_fast.ops import reference, rms_norm_modulate_silu
from mfd_fast.testing.numerics import assert_as_accurate

from capture import assert_captured_equals_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (x, samples): narrow rows, two frames of three samples, OccFM's widths on odd images, tokens of
# several chunks.
SHAPES = [
    ((4, 3, 5, 40), 4),
    ((6, 3, 5, 20), 3),
    ((4, 5, 3, 64), 2),
    ((2, 3, 3, 256), 1),
    ((4, 3, 600), 4),
]
EPS = 1e-12


def make_inputs(shape, samples, dtype, device):
    """x, gain, scale and shift as OccFM has them: the two halves of one linear's output."""
    x = torch.randn(shape, device=device).to(dtype)
    rows = torch.randn(samples, 2 * shape[-1], device=device).to(dtype)
    gain = torch.randn(shape[-1], device=device).to(dtype)
    return x, gain, *rows.chunk(2, dim=1)


def gradients(inputs, grad, dtype=None):
    """Autograd of the reference, in ``dtype`` or as given; what is None has none."""
    leaves = [x if x is None else x.to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = reference.rms_norm_modulate_silu(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(out, present, grad.to(out.dtype))


def op(*args):
    return torch.ops.mfd_fast.rms_norm_modulate_silu(*args)


def op_backward(*args):
    return torch.ops.mfd_fast._rms_norm_modulate_silu_backward(*args)


def check(launch, launch_backward, inputs):
    """Forward and every gradient, by the tolerance rule; ``launch`` gives (y, rstd)."""
    inputs = tuple(x if x is None else x.detach() for x in inputs)
    wide = tuple(x if x is None else x.double() for x in inputs)
    y, rstd = launch(*inputs, EPS)
    eager = reference.rms_norm_modulate_silu(*inputs)
    assert_as_accurate(y, eager, reference.rms_norm_modulate_silu(*wide))

    grad = torch.randn_like(y)
    ours = launch_backward(grad, *inputs, rstd, EPS, True)
    eager = gradients(inputs, grad)
    exact = gradients(inputs, grad, torch.float64)
    for one, two, three in zip(ours, eager, exact, strict=False):
        assert_as_accurate(one, two, three)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize(("shape", "samples"), SHAPES)
def test_kernel_matches_float64(shape, samples, modulated, dtype, triton_device):
    x, gain, *rows = make_inputs(shape, samples, dtype, triton_device)
    inputs = (x, gain, *(rows if modulated else (None, None)))
    check(kernel.rms_norm_modulate_silu, kernel.rms_norm_modulate_silu_backward, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize(("shape", "samples"), SHAPES)
def test_operator_matches_float64(shape, samples, modulated, dtype, device):
    x, gain, *rows = make_inputs(shape, samples, dtype, device)
    check(op, op_backward, (x, gain, *(rows if modulated else (None, None))))


def occfm(x, gain, scale, shift):
    """The specification's words, channels first: F.normalize * sqrt(C) * gamma, modulate, SiLU."""
    frames = x.shape[0] // scale.shape[0]
    x = x.permute(0, 3, 1, 2)
    h = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gain[:, None, None]
    scale, shift = (m.repeat_interleave(frames, 0)[:, :, None, None] for m in (scale, shift))
    return F.silu(h * (1 + scale) + shift).permute(0, 2, 3, 1)


def test_reference_is_the_specified_block():
    inputs = make_inputs((6, 3, 5, 20), 3, torch.float32, "cpu")
    exact = occfm(*(x.double() for x in inputs))
    assert_as_accurate(reference.rms_norm_modulate_silu(*inputs), occfm(*inputs), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_may_be_float32_beside_a_half_precision_stream(dtype, triton_device):
    x, *_ = make_inputs((4, 3, 70), 2, dtype, triton_device)
    _, *rows = make_inputs((4, 3, 70), 2, torch.float32, triton_device)
    check(kernel.rms_norm_modulate_silu, kernel.rms_norm_modulate_silu_backward, (x, *rows))
    check(op, op_backward, (x, *rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["large", "small"])
def test_extreme_values(size, dtype, triton_device):
    x, gain, scale, shift = make_inputs((4, 3, 70), 2, dtype, triton_device)
    if size == "large":
        x = (x.clamp(-3, 3) * (2e4 if dtype == torch.float16 else 1e15)).to(dtype)
        shift = shift * 100  # SiLU at plus and minus 100
    else:
        x = (x * (1e-3 if dtype == torch.float16 else 1e-8)).to(dtype)
    inputs = (x, gain, scale, shift)
    check(kernel.rms_norm_modulate_silu, kernel.rms_norm_modulate_silu_backward, inputs)
    check(op, op_backward, inputs)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-14])
def test_rows_under_the_least_norm_are_divided_by_it(factor, triton_device):
    x, *rows = make_inputs((4, 3, 70), 2, torch.float32, triton_device)
    inputs = (x * factor, *rows)
    check(kernel.rms_norm_modulate_silu, kernel.rms_norm_modulate_silu_backward, inputs)
    check(op, op_backward, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_is_the_silu_of_its_shift(dtype, device):
    x, gain, scale, shift = make_inputs((2, 3, 16), 2, dtype, device)
    out = rms_norm_modulate_silu(torch.zeros_like(x), gain, scale, shift)
    expected = F.silu(shift.double()).unsqueeze(1).expand(2, 3, 16)
    eager = F.silu(shift.float()).to(dtype).unsqueeze(1).expand(2, 3, 16)
    assert_as_accurate(out, eager, expected)


def test_backward_is_bitwise_reproducible(triton_device):
    inputs = make_inputs((4, 40, 48), 2, torch.float32, triton_device)
    _, rstd = kernel.rms_norm_modulate_silu(*inputs, EPS)
    args = (torch.randn_like(inputs[0]), *inputs, rstd, EPS, True)
    first, second = (kernel.rms_norm_modulate_silu_backward(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_beside_the_tensors_is_not_read(triton_device):
    def surrounded(x):
        size = x.numel()
        buffer = torch.full((size + 512,), float("nan"), device=x.device)
        buffer[256 : 256 + size] = x.flatten()
        return buffer[256 : 256 + size].view(x.shape)

    inputs = make_inputs((3, 3, 70), 3, torch.float32, triton_device)
    inputs = tuple(surrounded(x) for x in inputs)
    check(kernel.rms_norm_modulate_silu, kernel.rms_norm_modulate_silu_backward, inputs)


def test_the_halves_of_a_linear_are_taken_as_they_are(device):
    x, gain, scale, shift = make_inputs((4, 3, 5, 16), 2, torch.float32, device)
    assert not scale.is_contiguous() and not shift.is_contiguous()
    expected = rms_norm_modulate_silu(x, gain, scale.contiguous(), shift.contiguous())
    assert torch.equal(rms_norm_modulate_silu(x, gain, scale, shift), expected)


def test_a_channels_last_image_needs_no_copy(device):
    image = torch.randn(2, 16, 5, 7, device=device).to(memory_format=torch.channels_last)
    gain = torch.ones(16, device=device)
    assert rms_norm_modulate_silu(image.permute(0, 2, 3, 1), gain).shape == (2, 5, 7, 16)


def test_a_frozen_block_costs_no_sums(device):
    x, *rows = make_inputs((4, 3, 20), 2, torch.float32, device)
    grad = torch.randn_like(x)
    _, rstd = op(x, *rows, EPS)
    grad_x, *rest = op_backward(grad, x, *rows, rstd, EPS, False)
    assert [r.numel() for r in rest] == [0, 0, 0]
    x.requires_grad_()
    assert torch.equal(torch.autograd.grad(rms_norm_modulate_silu(x, *rows), x, grad)[0], grad_x)


def test_gradcheck(device):
    inputs = make_inputs((4, 2, 7), 2, torch.float64, device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.autograd.gradcheck(rms_norm_modulate_silu, leaves)
    torch.autograd.gradcheck(rms_norm_modulate_silu, leaves[:2])


@pytest.mark.parametrize("lanes", [0, 4])
def test_empty_batch(lanes, triton_device):
    samples = 2 if lanes else 0
    inputs = make_inputs((lanes, 0, 5, 16), samples, torch.float16, triton_device)
    for launch, backward in (
        (kernel.rms_norm_modulate_silu, kernel.rms_norm_modulate_silu_backward),
        (op, op_backward),
    ):
        y, rstd = launch(*inputs, EPS)
        assert y.shape == (lanes, 0, 5, 16)
        grads = backward(y, *inputs, rstd, EPS, True)
        assert [tuple(g.shape) for g in grads] == [y.shape, (16,), (samples, 16), (samples, 16)]
        assert all(not g.any() for g in grads)
    assert rms_norm_modulate_silu(*inputs).shape == (lanes, 0, 5, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("modulated", [True, False])
def test_opcheck(modulated, dtype, device):
    x, gain, *rows = make_inputs((4, 2, 16), 2, dtype, device)
    rows = [r.detach().requires_grad_() for r in rows] if modulated else [None, None]
    args = (x.requires_grad_(), gain.requires_grad_(), *rows, EPS)
    torch.library.opcheck(torch.ops.mfd_fast.rms_norm_modulate_silu.default, args)
    inputs = [t if t is None else t.detach() for t in args[:4]]
    _, rstd = op(*inputs, EPS)
    backward = torch.ops.mfd_fast._rms_norm_modulate_silu_backward.default
    for with_sums in (False, True):
        args = (torch.randn_like(inputs[0]), *inputs, rstd, EPS, with_sums)
        torch.library.opcheck(backward, args)


X = torch.zeros(4, 3, 5, 16, dtype=torch.float16)
ROWS = torch.zeros(2, 16, dtype=torch.float16)
ERRORS = [
    ({"x": X[0, 0, 0]}, r"x must be \[N, ..., C\]; got \[16\]"),
    ({"x": X.permute(0, 2, 1, 3)}, "x must be contiguous"),
    ({"x": X.int()}, "x must be float32.*got torch.int32"),
    ({"gain": ROWS}, r"gain must be contiguous \[16\]; got \[2, 16\]"),
    ({"gain": ROWS[0].bfloat16()}, "gain must be torch.float16 or torch.float32 .* torch.bfloat16"),
    ({"eps": 0.0}, "eps must be > 0, the least norm of a row; got 0.0"),
    ({"scale": None}, "scale and shift must be given together; scale is None"),
    ({"shift": None}, "scale and shift must be given together; shift is None"),
    ({"scale": ROWS[:, :4]}, r"scale must be \[S, 16\]; got \[2, 4\]"),
    ({"shift": ROWS[:1]}, r"shift must be like scale, torch.float16 \[2, 16\]; got .*\[1, 16\]"),
    ({"shift": ROWS.to("meta")}, "shift must be on cpu, like x; got meta"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_error_sentences(changes, message):
    arguments = {"x": X, "gain": ROWS[0], "scale": ROWS, "shift": ROWS} | changes
    with pytest.raises(ValueError, match=f"^rms_norm_modulate_silu: {message}"):
        rms_norm_modulate_silu(**arguments)


@pytest.mark.gpu
def test_captured_step_equals_the_eager_one():
    inputs = make_inputs((24, 25, 25, 256), 2, torch.float16, "cuda")
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step():
        out = rms_norm_modulate_silu(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    assert_captured_equals_eager(step)
