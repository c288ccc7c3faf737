"""LayerNorm / RMS norm + modulation: the operator and its Triton kernels against float64."""

import pytest
import torch
import torch.nn.functional as F

from mfd_fast.kernels import layer_norm_modulate as kernel
from mfd_fast.kernels import norm_modulate_backward
from mfd_fast.ops import layer_norm_modulate, reference
from mfd_fast.testing.numerics import assert_as_accurate

from capture import assert_captured_equals_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (lanes, tokens, channels, samples): narrow rows, three lanes of two samples with a ragged row,
# several chunks; SANA's width, and the widest row, which takes several warps.
SHAPES = [(4, 9, 40, 4), (6, 5, 77, 2), (4, 3, 600, 4)]
WIDE_SHAPES = [(3, 2, 2240, 1), (1, 2, 8192, 1)]
KINDS = [("layer", False), ("rms", True)]


def make_inputs(lanes, tokens, channels, samples, dtype, device):
    """x, scale, shift and gain as SANA has them: two of the six rows of one tensor."""
    x = torch.randn(lanes, tokens, channels, device=device).to(dtype)
    rows = torch.randn(samples, 6, channels, device=device).to(dtype)
    return x, rows[:, 1], rows[:, 4], torch.randn(channels, device=device).to(dtype)


def named(inputs, has_gain):
    return (*inputs[:3], inputs[3] if has_gain else None)


def gradients(inputs, grad, kind, dtype=None):
    """Autograd of the reference, in ``dtype`` or as given; None where an input is None."""
    leaves = [x if x is None else x.to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = reference.layer_norm_modulate(*leaves, 1e-6, kind)
    present = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(out, present, grad.to(out.dtype))


def check(launch, launch_backward, inputs, kind):
    """Forward and every gradient, by the tolerance rule; ``launch`` gives (y, mean, rstd, ...)."""
    inputs = tuple(x if x is None else x.detach() for x in inputs)
    wide = tuple(x if x is None else x.double() for x in inputs)
    y, mean, rstd, _ = launch(*inputs, 1e-6, kind)
    eager = reference.layer_norm_modulate(*inputs, 1e-6, kind)
    assert_as_accurate(y, eager, reference.layer_norm_modulate(*wide, 1e-6, kind))

    grad = torch.randn_like(y)
    x, scale, _, gain = inputs
    ours = launch_backward(grad, x, scale, gain, mean, rstd, kind, True)
    eager = gradients(inputs, grad, kind)
    exact = gradients(inputs, grad, kind, torch.float64)
    for one, two, three in zip(ours, eager, exact, strict=False):
        assert_as_accurate(one, two, three)


def op(*args):
    return torch.ops.mfd_fast.layer_norm_modulate(*args, None, None, None)


def op_backward(*args):
    return torch.ops.mfd_fast._layer_norm_modulate_backward(*args, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "has_gain"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_float64(shape, kind, has_gain, dtype, triton_device):
    inputs = make_inputs(*shape, dtype, triton_device)
    launch, launch_backward = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
    check(launch, launch_backward, named(inputs, has_gain), kind)


@pytest.mark.parametrize(("kind", "dtype"), [("layer", torch.bfloat16), ("rms", torch.float32)])
@pytest.mark.parametrize("shape", WIDE_SHAPES)
def test_kernel_matches_float64_on_wide_rows(shape, kind, dtype, triton_device):
    inputs = make_inputs(*shape, dtype, triton_device)
    launch, launch_backward = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
    check(launch, launch_backward, named(inputs, kind == "rms"), kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "has_gain"), KINDS)
@pytest.mark.parametrize("shape", SHAPES + WIDE_SHAPES)
def test_operator_matches_float64(shape, kind, has_gain, dtype, device):
    inputs = make_inputs(*shape, dtype, device)
    check(op, op_backward, named(inputs, has_gain), kind)


def test_reference_is_the_torch_norm():
    x, scale, shift, gain = make_inputs(6, 5, 77, 2, torch.float32, "cpu")

    def plain(x, scale, shift, gain, kind):
        lanes = x.shape[0] // scale.shape[0]
        scale, shift = (m.repeat_interleave(lanes, 0).unsqueeze(1) for m in (scale, shift))
        norm = F.layer_norm if kind == "layer" else F.rms_norm
        return norm(x, x.shape[-1:], gain, eps=1e-6) * (1 + scale) + shift

    for kind in ("layer", "rms"):
        wide = (x.double(), scale.double(), shift.double(), gain.double())
        actual = reference.layer_norm_modulate(x, scale, shift, gain, 1e-6, kind)
        assert_as_accurate(actual, plain(x, scale, shift, gain, kind), plain(*wide, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_may_be_float32_beside_a_half_precision_stream(dtype, triton_device):
    x, *_ = make_inputs(4, 3, 70, 2, dtype, triton_device)
    _, scale, shift, gain = make_inputs(4, 3, 70, 2, torch.float32, triton_device)
    launch, launch_backward = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
    check(launch, launch_backward, (x, scale, shift, gain), "rms")
    check(op, op_backward, (x, scale, shift, gain), "layer")


EXTREMES = {
    "large": lambda x: x * (1e4 if x.dtype == torch.float16 else 1e15),
    "tiny": lambda x: x * (1e-7 if x.dtype == torch.float16 else 1e-18),
    "zero": torch.zeros_like,
    "far from zero": lambda x: x + 1e3,
    "one row of zeros": lambda x: x * (torch.arange(x.shape[1], device=x.device)[:, None] > 0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_values(extreme, dtype, triton_device):
    x, scale, shift, gain = make_inputs(2, 3, 130, 1, dtype, triton_device)
    x = EXTREMES[extreme](x).to(dtype)
    launch, launch_backward = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
    for kind in ("layer", "rms"):
        check(launch, launch_backward, (x, scale, shift, gain), kind)
        check(op, op_backward, (x, scale, shift, gain), kind)


@pytest.mark.parametrize("programs", [1, 6, 1000])
def test_sums_do_not_depend_on_how_the_rows_are_divided(programs, triton_device, monkeypatch):
    monkeypatch.setattr(norm_modulate_backward, "PROGRAMS", programs)
    for channels in (70, 150):  # several rows in a tile; several chunks in a row
        inputs = make_inputs(4, 37, channels, 2, torch.float32, triton_device)
        launch, launch_backward = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
        check(launch, launch_backward, inputs, "layer")


def test_backward_is_bitwise_reproducible(triton_device):
    x, scale, _, gain = make_inputs(4, 50, 96, 2, torch.float32, triton_device)
    _, mean, rstd, _ = kernel.layer_norm_modulate(x, scale, scale, gain, 1e-6, "layer")
    args = (torch.randn_like(x), x, scale, gain, mean, rstd, "layer", True)
    first = kernel.layer_norm_modulate_backward(*args)
    second = kernel.layer_norm_modulate_backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_beside_the_tensors_is_not_read(triton_device):
    def surrounded(x):
        size = x.numel()
        buffer = torch.full((size + 512,), float("nan"), device=x.device)
        buffer[256 : 256 + size] = x.flatten()
        return buffer[256 : 256 + size].view(x.shape)

    inputs = make_inputs(3, 3, 77, 3, torch.float32, triton_device)
    inputs = tuple(surrounded(x) for x in inputs)
    launch, launch_backward = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
    check(launch, launch_backward, inputs, "layer")


def test_a_sample_modulates_its_own_lanes(device):
    x, scale, shift, _ = make_inputs(6, 4, 32, 3, torch.float32, device)
    out = layer_norm_modulate(x, scale, shift)
    for sample in range(3):
        lanes, own = slice(2 * sample, 2 * sample + 2), slice(sample, sample + 1)
        alone = layer_norm_modulate(x[lanes], scale[own], shift[own])
        assert torch.equal(out[lanes], alone)


def test_one_channel_is_its_own_mean(device):
    x, scale, shift, _ = make_inputs(2, 3, 1, 2, torch.float32, device)
    x.requires_grad_()
    out = layer_norm_modulate(x, scale, shift)
    assert torch.equal(out, shift.unsqueeze(1).expand(2, 3, 1))
    assert not torch.autograd.grad(out.sum(), x)[0].any()


def test_strided_rows_equal_their_copies(device):
    x, scale, shift, _ = make_inputs(4, 3, 40, 2, torch.float32, device)
    assert not scale.is_contiguous()
    copied = layer_norm_modulate(x, scale.contiguous(), shift.contiguous())
    assert torch.equal(layer_norm_modulate(x, scale, shift), copied)


def test_frozen_rows_cost_no_sums(device):
    x, scale, shift, _ = make_inputs(2, 3, 40, 2, torch.float32, device)
    grad = torch.randn_like(x)
    _, mean, rstd, _ = op(x, scale, shift, None, 1e-6, "layer")
    grad_x, *rest = op_backward(grad, x, scale, None, mean, rstd, "layer", False)
    assert [r.numel() for r in rest] == [0, 0, 0, 0]
    x.requires_grad_()
    out = layer_norm_modulate(x, scale, shift)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], grad_x)


def test_expanded_gradient(device):
    x, scale, shift, _ = make_inputs(2, 3, 40, 2, torch.float64, device)
    x.requires_grad_()
    grad = torch.autograd.grad(layer_norm_modulate(x, scale, shift).sum(), x)[0]
    ones = torch.autograd.grad(layer_norm_modulate(x, scale, shift), x, torch.ones_like(x))[0]
    assert torch.equal(grad, ones)


@pytest.mark.parametrize(("kind", "has_gain"), KINDS)
def test_gradcheck(kind, has_gain, device):
    inputs = make_inputs(4, 2, 7, 2, torch.float64, device)
    x, scale, shift, gain = (t.clone().requires_grad_() for t in inputs)
    if has_gain:
        torch.autograd.gradcheck(
            lambda *a: layer_norm_modulate(*a[:3], gain=a[3], kind=kind), (x, scale, shift, gain)
        )
    else:
        torch.autograd.gradcheck(lambda *a: layer_norm_modulate(*a, kind=kind), (x, scale, shift))


@pytest.mark.parametrize("lanes", [0, 4])
def test_empty_batch(lanes, triton_device):
    samples = 2 if lanes else 0
    inputs = make_inputs(lanes, 0, 16, samples, torch.bfloat16, triton_device)
    for launch, backward in (
        (kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward),
        (op, op_backward),
    ):
        y, mean, rstd, _ = launch(*inputs, 1e-6, "layer")
        assert y.shape == (lanes, 0, 16)
        grads = backward(y, inputs[0], inputs[1], inputs[3], mean, rstd, "layer", True)
        shapes = [y.shape, (samples, 16), (samples, 16), (16,), (0,)]
        assert [tuple(g.shape) for g in grads] == shapes
        assert all(not g.any() for g in grads)
    assert layer_norm_modulate(*inputs[:3]).shape == (lanes, 0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "has_gain"), KINDS)
def test_opcheck(kind, has_gain, dtype, device):
    x, scale, shift, gain = named(make_inputs(4, 2, 16, 2, dtype, device), has_gain)
    args = (x.requires_grad_(), scale.detach().requires_grad_(), shift, gain, 1e-6, kind)
    torch.library.opcheck(torch.ops.mfd_fast.layer_norm_modulate.default, (*args, *3 * [None]))
    with torch.no_grad():
        _, mean, rstd, _ = op(*args)
        grad = torch.randn_like(x)
    for with_sums in (False, True):
        args = (grad, x.detach(), scale.detach(), gain, mean, rstd, kind, with_sums, None, None)
        torch.library.opcheck(torch.ops.mfd_fast._layer_norm_modulate_backward.default, args)


def bad(**changes):
    x, scale, shift, gain = make_inputs(4, 2, 16, 2, torch.bfloat16, "cpu")
    arguments = {"x": x, "scale": scale, "shift": shift, "gain": gain} | changes
    return arguments.pop("x"), arguments.pop("scale"), arguments.pop("shift"), arguments


ROW = torch.zeros(2, 16, dtype=torch.bfloat16)
ERRORS = [
    ({"kind": "batch"}, "kind must be 'layer' or 'rms'; got 'batch'"),
    ({"x": torch.zeros(4, 16)}, r"x must be \[R, T, C\]; got \[4, 16\]"),
    ({"x": torch.zeros(4, 2, 16, dtype=torch.int64)}, "x must be float32.*got torch.int64"),
    ({"x": torch.zeros(1, 1, 8193)}, "x must have 1 to 8192 channels; got 8193"),
    ({"x": torch.zeros(4, 16, 2, dtype=torch.bfloat16).mT}, "x must be contiguous"),
    ({"scale": ROW[:, :8]}, r"scale must be \[S, 16\]; got \[2, 8\]"),
    ({"scale": ROW[0]}, r"scale must be \[S, 16\]; got \[16\]"),
    (
        {"scale": torch.zeros(3, 16, dtype=torch.bfloat16)},
        "scale must have S rows with S a divisor of the 4 .* S = 3",
    ),
    ({"scale": ROW.mT.contiguous().mT}, "scale must be contiguous along the channels"),
    ({"scale": ROW.half()}, "scale must be torch.bfloat16 or torch.float32.*got torch.float16"),
    ({"shift": ROW.to("meta")}, "shift must be on cpu, like x; got meta"),
    (
        {"shift": ROW.float()},
        r"shift must be like scale, torch.bfloat16 \[2, 16\]; got torch.float32",
    ),
    ({"shift": ROW[:1]}, r"shift must be like scale, .* got torch.bfloat16 \[1, 16\]"),
    ({"gain": ROW}, r"gain must be contiguous \[16\]; got \[2, 16\]"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_error_sentences(changes, message):
    x, scale, shift, keywords = bad(**changes)
    with pytest.raises(ValueError, match=f"^layer_norm_modulate: {message}"):
        layer_norm_modulate(x, scale, shift, **keywords)


@pytest.mark.gpu
def test_captured_step_equals_the_eager_one():
    x, scale, shift, _ = make_inputs(3, 64, 2240, 1, torch.bfloat16, "cuda")
    x.requires_grad_()

    def step():
        out = layer_norm_modulate(x, scale, shift)
        return out, torch.autograd.grad(out, x, torch.ones_like(out))[0]

    assert_captured_equals_eager(step)
