"""SiLU, depthwise 3x3 and gate in one pass: the operator against float64."""

import pytest
import torch
import torch.nn.functional as F

from mfd_fast.kernels import glu_depthwise as kernel
from mfd_fast.ops import glu_depthwise, reference
from mfd_fast.ops.glu_depthwise import _reference_backward
from mfd_fast.testing.numerics import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, height, width, channels of a half): whole vectors, ragged channels, one pixel, a high
# image, and images wider than a block of the CUDA kernel (32 columns; the backward's overlap).
SHAPES = [
    (2, 5, 6, 32),
    (1, 4, 7, 53),
    (2, 1, 1, 3),
    (1, 37, 4, 24),
    (1, 3, 70, 19),
    (1, 6, 33, 264),
]


def make_inputs(rows, height, width, channels, dtype, device, scale=1.0):
    """x, weight, bias, in_bias and the gradient at the output."""
    x = torch.randn(rows, height * width, 2 * channels, device=device) * scale
    weight = torch.randn(2 * channels, 1, 3, 3, device=device) / 3
    bias, in_bias = torch.randn(2, 2 * channels, device=device) * scale
    grad = torch.randn(rows, height * width, channels, device=device)
    return tuple(t.to(dtype) for t in (x, weight, bias, in_bias, grad))


def wide(tensors):
    return tuple(t if t is None else t.double() for t in tensors)


def eager_gradients(x, weight, bias, in_bias, grad, size):
    """Autograd of the reference to everything that is there."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, in_bias)]
    out = reference.glu_depthwise(*leaves, *size)
    return torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)


def check(x, weight, bias, in_bias, grad, size):
    """Output and every gradient by the tolerance rule."""
    tensors = (x, weight, bias, in_bias)
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = glu_depthwise(*leaves[:3], *size, in_bias=leaves[3])
    eager = reference.glu_depthwise(*tensors, *size)
    assert_as_accurate(out.detach(), eager, reference.glu_depthwise(*wide(tensors), *size))

    ours = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)
    eager = eager_gradients(*tensors, grad, size)
    exact = eager_gradients(*wide(tensors), grad.double(), size)
    for one, two, three in zip(ours, eager, exact, strict=True):
        assert_as_accurate(one, two, three)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_in_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_matches_float64(shape, has_in_bias, dtype, device):
    x, weight, bias, in_bias, grad = make_inputs(*shape, dtype, device)
    check(x, weight, bias, in_bias if has_in_bias else None, grad, shape[1:3])


def assert_launchers_accurate(lanes, x, weight, bias, in_bias, grad, size):
    """Output and gradients of the Triton launchers by the tolerance rule."""
    tensors = (x, weight, bias, in_bias)
    out = lanes.glu_depthwise(*tensors, *size)
    eager = reference.glu_depthwise(*tensors, *size)
    assert_as_accurate(out, eager, reference.glu_depthwise(*wide(tensors), *size))
    ours = lanes.glu_depthwise_backward(grad, *tensors, *size, True)
    eager = _reference_backward(grad, *tensors, *size, True)
    exact = _reference_backward(grad.double(), *wide(tensors), *size, True)
    for one, two, three in zip(ours, eager, exact, strict=True):
        assert_as_accurate(one, two, three)
    alone, none = lanes.glu_depthwise_backward(grad, *tensors, *size, False)
    assert torch.equal(alone, ours[0]) and none.numel() == 0


# Segments of one row; a whole image in one walk, in whole strips and overlapping tiles of channels,
# or with a strip that is not whole; one pixel.
@pytest.mark.parametrize(
    ("shape", "scale", "multiprocessors"),
    [
        ((1, 3, 5, 3), 1.0, 132),
        ((1, 2, 16, 70), 30.0, 1),
        ((1, 2, 9, 35), 1.0, 1),
        ((2, 1, 1, 3), 1e-20, 132),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_matches_float64(shape, scale, multiprocessors, dtype, triton_device, monkeypatch):
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: multiprocessors)
    *tensors, grad = make_inputs(*shape, dtype, triton_device, scale)
    if scale == 30.0:
        tensors[3] = None
    assert_launchers_accurate(kernel, *tensors, grad, shape[1:3])


@pytest.mark.parametrize("value", [1e15, -1e15, float("nan")])
def test_triton_takes_extreme_values(value, triton_device):
    *tensors, grad = make_inputs(1, 3, 5, 2, torch.bfloat16, triton_device)
    tensors[0][0, 0, 1], tensors[0][0, 0, 3] = value, value  # a value and its gate
    out = kernel.glu_depthwise(*tensors, 3, 5).view(3, 5, 2)
    grad_x = kernel.glu_depthwise_backward(grad, *tensors, 3, 5, False)[0].view(3, 5, 4)
    if value == value:
        assert_launchers_accurate(kernel, *tensors, grad, (3, 5))
    else:
        assert out[:2, :2, 1].isnan().all() and grad_x[:3, :3, 1::2].isnan().all()
    assert out[2].isfinite().all() and grad_x[:, 4:].isfinite().all()


def test_triton_cuts_a_walk_only_where_schedulers_are_idle():
    assert kernel.segment_rows(1, 32, 1, 528) == 1
    assert kernel.segment_rows(100 * 528, 32, 1, 528) == 32
    assert 32 % kernel.segment_rows(528, 32, 1, 528) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 30.0, 1e15])
def test_extreme_values(scale, dtype, device):
    if dtype == torch.float16 and scale == 1e15:
        scale = 60.0  # a product of two larger ones overflows
    check(*make_inputs(2, 3, 5, 40, dtype, device, scale), (3, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_outside_the_image_are_zero_after_the_activation(dtype, device):
    """With x = 0 an interior pixel sums nine SiLU(in_bias), a corner four."""
    _, _, _, in_bias, _ = make_inputs(1, 3, 3, 8, dtype, device)
    weight = torch.ones(16, 1, 3, 3, dtype=dtype, device=device)
    out = glu_depthwise(
        in_bias.new_zeros(1, 9, 16), weight, torch.zeros_like(in_bias), 3, 3, in_bias=in_bias
    )

    def gate(count, in_bias):
        value, gate = (count * F.silu(in_bias)).chunk(2)
        return value * F.silu(gate)

    for pixel, count in ((0, 4), (1, 6), (4, 9)):
        assert_as_accurate(out[0, pixel], gate(count, in_bias), gate(count, in_bias.double()))


def test_is_the_unit_of_diffusers(device):
    sana = pytest.importorskip("diffusers.models.transformers.sana_transformer")
    unit = sana.GLUMBConv(12, 12, expand_ratio=2.5, norm_type=None, residual_connection=False)
    unit = unit.to(device).requires_grad_(False)
    x = torch.randn(2, 12, 4, 6, device=device)

    def ours(tokens, unit):
        widened = F.linear(tokens, unit.conv_inverted.weight[:, :, 0, 0])
        depth = unit.conv_depth
        in_bias = unit.conv_inverted.bias
        gated = glu_depthwise(widened, depth.weight, depth.bias, 4, 6, in_bias=in_bias)
        return F.linear(gated, unit.conv_point.weight[:, :, 0, 0])

    actual = ours(x.flatten(2).mT, unit).mT.unflatten(2, (4, 6))
    eager = unit(x)
    assert_as_accurate(actual, eager, unit.double()(x.double()))


@pytest.mark.parametrize("has_in_bias", [False, True])
def test_gradcheck(has_in_bias):
    x, weight, bias, in_bias, _ = make_inputs(1, 3, 4, 3, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in (x, weight, bias, in_bias)]
    if not has_in_bias:
        leaves[3] = None

    def call(x, weight, bias, in_bias):
        return glu_depthwise(x, weight, bias, 3, 4, in_bias=in_bias)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("has_in_bias", [False, True])
def test_reference_backward_is_the_autograd_of_the_reference(has_in_bias):
    *tensors, grad = make_inputs(2, 4, 5, 7, torch.float32, "cpu")
    if not has_in_bias:
        tensors[3] = None
    actual, _ = _reference_backward(grad, *tensors, 4, 5, False)
    eager = eager_gradients(*tensors, grad, (4, 5))[0]
    exact = eager_gradients(*wide(tensors), grad.double(), (4, 5))[0]
    assert_as_accurate(actual, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_to_x_does_not_depend_on_what_else_is_trained(dtype, device):
    *tensors, grad = make_inputs(1, 4, 5, 20, dtype, device)
    args = (grad, *tensors, 4, 5)
    alone, none = torch.ops.mfd_fast._glu_depthwise_backward(*args, False)
    beside, conv = torch.ops.mfd_fast._glu_depthwise_backward(*args, True)
    assert torch.equal(alone, beside)
    assert none.numel() == 0 and conv.shape == tensors[0].shape


def test_same_bits_in_every_run_and_with_any_number_of_threads(device):
    *tensors, grad = make_inputs(2, 6, 7, 600, torch.float32, device)
    args = (*tensors, 6, 7)

    def run():
        grads = torch.ops.mfd_fast._glu_depthwise_backward(grad, *args, True)
        return torch.ops.mfd_fast.glu_depthwise(*args), *grads

    first, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_reaches_its_neighbours(dtype, device):
    *tensors, grad = make_inputs(1, 3, 5, 8, dtype, device)
    tensors[0][0, 0, 3] = float("nan")
    out = glu_depthwise(*tensors[:3], 3, 5, in_bias=tensors[3]).view(3, 5, 8)
    assert out[:2, :2, 3].isnan().all()
    grad_x, _ = torch.ops.mfd_fast._glu_depthwise_backward(grad, *tensors, 3, 5, False)
    assert grad_x.view(3, 5, 16)[:3, :3, 8 + 3].isnan().all()  # through the product
    assert not grad_x[0, 14].isnan().any()


def test_memory_beside_the_tensors_is_not_read(device):
    def surrounded(t):
        buffer = torch.full((t.numel() + 512,), float("nan"), device=device)
        return buffer[256:-256].view_as(t).copy_(t)

    *tensors, grad = make_inputs(2, 3, 5, 21, torch.float32, device)
    check(*(surrounded(t) for t in (*tensors, grad)), (3, 5))


def test_other_strides_are_taken(device):
    x, weight, bias, in_bias, _ = make_inputs(2, 3, 4, 8, torch.float32, device)
    expected = glu_depthwise(x, weight, bias, 3, 4, in_bias=in_bias)
    strided = x.mT.contiguous().mT
    channels_last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(glu_depthwise(strided, channels_last, bias, 3, 4, in_bias=in_bias), expected)


def test_empty_batch(device):
    x, weight, bias, in_bias, grad = make_inputs(0, 3, 4, 8, torch.float32, device)
    out = glu_depthwise(x.requires_grad_(), weight, bias, 3, 4, in_bias=in_bias)
    assert out.shape == grad.shape
    assert torch.autograd.grad(out, x, grad)[0].shape == x.shape
    x = x.detach()
    assert kernel.glu_depthwise(x, weight, bias, None, 3, 4).shape == grad.shape
    gradients = kernel.glu_depthwise_backward(grad, x, weight, bias, None, 3, 4, True)
    assert [gradient.shape for gradient in gradients] == [x.shape, x.shape]


@pytest.mark.parametrize("has_in_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, has_in_bias, device):
    *tensors, grad = make_inputs(1, 3, 4, 6, dtype, device)
    x, weight, bias, in_bias = (t.requires_grad_() for t in tensors)
    args = (x, weight, bias, in_bias if has_in_bias else None, 3, 4)
    torch.library.opcheck(torch.ops.mfd_fast.glu_depthwise.default, args)
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    for with_conv in (False, True):
        backward = torch.ops.mfd_fast._glu_depthwise_backward.default
        torch.library.opcheck(backward, (grad, *args, with_conv))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x": a["x"][0]}, r"x must be floating \[R, 3 \* 4, 2C\]; got"),
        (lambda a: {"x": a["x"][:, :0], "height": 0}, r"x must be floating \[R, 0 \* 4, 2C\]; got"),
        (lambda a: {"height": 5}, r"x must be floating \[R, 5 \* 4, 2C\]; got"),
        (lambda a: {"x": a["x"][..., 1:]}, r"got torch.float32 \[2, 12, 15\]"),
        (lambda a: {"x": a["x"].long()}, r"got torch.int64 \[2, 12, 16\]"),
        (lambda a: {"weight": a["weight"][1:]}, r"weight must be torch.float32 \[16, 1, 3, 3\]"),
        (
            lambda a: {"bias": a["bias"].half()},
            r"bias must be torch.float32 \[16\] on cpu.*float16",
        ),
        (lambda a: {"in_bias": a["bias"][1:]}, r"in_bias must be torch.float32 \[16\].*\[15\] on"),
        (lambda a: {"bias": a["bias"].to("meta")}, r"on cpu, like x; got .* on meta"),
    ],
)
def test_error_sentences(change, message):
    x, weight, bias, _, _ = make_inputs(2, 3, 4, 8, torch.float32, "cpu")
    arguments = {"x": x, "weight": weight, "bias": bias, "height": 3, "width": 4}
    with pytest.raises(ValueError, match="glu_depthwise: .*" + message):
        glu_depthwise(**(arguments | change(arguments)))
