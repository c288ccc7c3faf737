"""segmented_lora: CPU and Triton against the float64 reference."""

from itertools import pairwise

import pytest
import torch

from mfd_fast.kernels import segmented_lora as kernel
from mfd_fast.ops import reference, segmented_lora, segmented_lora_
from mfd_fast.testing.numerics import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.7
# (T, Cin, G, Cout, rank, rows): several tiles of each dimension with ragged tails; more than one
# step of the sum over the rank; a rank of one and targets narrower than a tile; every row the same.
SHAPES = [
    (70, 40, 3, 37, 5, (-1, 1, 0)),
    (9, 70, 1, 133, 100, (0, -1)),
    (5, 3, 2, 2, 1, (2, -1, 0, 2)),
    (33, 24, 2, 24, 64, (0, 0)),
]


class Cpu:
    """The operators as installed on the CPU."""

    segmented_lora = staticmethod(lambda *args: torch.ops.mfd_fast.segmented_lora(*args))
    segmented_lora_ = staticmethod(lambda *args: torch.ops.mfd_fast.segmented_lora_(*args))
    segmented_lora_backward = staticmethod(
        lambda *args: torch.ops.mfd_fast._segmented_lora_backward(*args)
    )


@pytest.fixture(params=["cpu", "triton"])
def implementation(request, triton_device):
    """(module or class with the three launchers, device)."""
    return (Cpu, "cpu") if request.param == "cpu" else (kernel, triton_device)


def make_inputs(shape, dtype, device="cpu", factors=None):
    """y, x, a, b, rows; the factors of an adapter lie in one flat vector, A and B in turns."""
    tokens, width, groups, out_width, rank, rows = shape
    adapters = max(rows) + 2  # one that no row has
    y, x = torch.randn(len(rows), tokens, groups * out_width), torch.randn(len(rows), tokens, width)
    pair = rank * (width + out_width)
    flat = torch.randn(adapters, groups, pair).to(factors or dtype).to(device)
    a, b = flat.split([rank * width, rank * out_width], dim=2)
    a, b = a.unflatten(2, (rank, width)), b.unflatten(2, (out_width, rank))
    rows = torch.tensor(rows, dtype=torch.int32, device=device)
    return y.to(dtype).to(device), x.to(dtype).to(device), a, b, rows


def exact_inputs(y, x, a, b, rows):
    """In float64, with the factors rounded to x's dtype as the operator reads them."""
    return y.double(), x.double(), a.to(x.dtype).double(), b.to(x.dtype).double(), rows


def assert_accurate(lanes, args):
    eager = reference.segmented_lora(*args, SCALE)
    exact = reference.segmented_lora(*exact_inputs(*args), SCALE)
    out, hidden = lanes.segmented_lora(*args, SCALE)
    assert_as_accurate(out, eager, exact)
    assert hidden.isfinite().all()
    y = args[0].clone()
    lanes.segmented_lora_(y, *args[1:], SCALE)
    assert_as_accurate(y, eager, exact)
    assert torch.equal(y, out)


def gradients(args, grad):
    """What autograd makes of the reference, for y, x, a and b."""
    *tensors, rows = args
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(reference.segmented_lora(*leaves, rows, SCALE), leaves, grad)


def assert_backward_accurate(lanes, args):
    _, x, a, b, rows = args
    out, hidden = lanes.segmented_lora(*args, SCALE)
    grad = torch.randn_like(out)
    ours = lanes.segmented_lora_backward(grad, x, hidden, a, b, rows, SCALE, True)
    eager = gradients(args, grad)[1:]
    exact = gradients(exact_inputs(*args), grad.double())[1:]
    for actual, yardstick, true in zip(ours, eager, exact, strict=True):
        assert_as_accurate(actual, yardstick, true)
    without_x = lanes.segmented_lora_backward(grad, x, hidden, a, b, rows, SCALE, False)
    assert without_x[0].numel() == 0
    assert all(torch.equal(p, q) for p, q in zip(without_x[1:], ours[1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, implementation):
    lanes, device = implementation
    args = make_inputs(shape, dtype, device)
    assert_accurate(lanes, args)
    assert_backward_accurate(lanes, args)


def test_parts_of_a_sum_leave_their_counters_at_zero(triton_device):
    """One sum in two launches of two parts each, for rows with and without an adapter."""
    args = make_inputs((10, 40, 2, 18, 5, (-1, 1, 0)), torch.float32, triton_device)
    first, second = (kernel.segmented_lora(*args, SCALE) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    device = args[0].device
    assert not kernel._arrivals(device, kernel._stream(device)).any()


def test_more_tiles_than_counters_are_whole_sums(triton_device, monkeypatch):
    args = make_inputs((10, 40, 2, 18, 5, (-1, 1, 0)), torch.float32, triton_device)
    parts = kernel.segmented_lora(*args, SCALE)[0]
    monkeypatch.setattr(kernel, "ARRIVALS", 1)
    assert_accurate(kernel, args)
    assert torch.allclose(parts, kernel.segmented_lora(*args, SCALE)[0], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_masters_of_a_16_bit_model(dtype, implementation):
    lanes, device = implementation
    args = make_inputs((20, 24, 2, 17, 6, (1, -1, 0)), dtype, device, factors=torch.float32)
    assert_accurate(lanes, args)
    assert_backward_accurate(lanes, args)
    rounded = [*args[:2], *(factor.to(dtype) for factor in args[2:4]), args[4]]
    ours, theirs = (lanes.segmented_lora(*each, SCALE)[0] for each in (args, rounded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, 1e-4, 0.0])
def test_large_tiny_and_zero_values(scale, dtype, implementation):
    lanes, device = implementation
    y, x, a, b, rows = make_inputs((9, 16, 2, 20, 4, (0, -1)), dtype, device)
    args = (y, x * scale, a, b * scale, rows)
    assert_accurate(lanes, [arg.contiguous() for arg in args])


def test_rows_without_an_adapter_keep_their_bits(implementation):
    lanes, device = implementation
    y, x, a, b, rows = make_inputs((70, 16, 2, 20, 4, (-1, 0, -1)), torch.float32, device)
    x[0], y[2] = torch.nan, torch.inf
    out, hidden = lanes.segmented_lora(y, x, a, b, rows, SCALE)
    in_place = y.clone()
    lanes.segmented_lora_(in_place, x, a, b, rows, SCALE)
    for result in (out, in_place):
        assert torch.equal(result[::2], y[::2])
        assert result[1].isfinite().all()
    grads = lanes.segmented_lora_backward(torch.ones_like(y), x, hidden, a, b, rows, SCALE, True)
    assert not grads[0][::2].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_an_adapter_without_rows_gets_a_zero_gradient(implementation):
    lanes, device = implementation
    y, x, a, b, rows = make_inputs((10, 8, 1, 8, 3, (0, 2)), torch.float32, device)
    _, hidden = lanes.segmented_lora(y, x, a, b, rows, SCALE)
    _, *grads = lanes.segmented_lora_backward(
        torch.randn_like(y), x, hidden, a, b, rows, SCALE, True
    )
    for grad in grads:
        assert not grad[1::2].any()
        assert grad[0].any() and grad[2].any()


def test_same_bits_every_time(implementation):
    lanes, device = implementation
    y, x, a, b, rows = make_inputs((70, 24, 2, 20, 5, (0, 0, 1)), torch.float32, device)
    results = []
    for _ in range(3):
        out, hidden = lanes.segmented_lora(y, x, a, b, rows, SCALE)
        results.append(
            (out, *lanes.segmented_lora_backward(out, x, hidden, a, b, rows, SCALE, True))
        )
    for one, other in pairwise(results):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 2, 8, 3, (0, 1)), (4, 8, 1, 8, 3, ())])
def test_empty(shape, implementation):
    lanes, device = implementation
    rows = shape[-1] or (0,)
    y, x, a, b, index = make_inputs((*shape[:-1], rows), torch.float32, device)
    count = len(shape[-1])
    y, x, index = y[:count], x[:count], index[:count]
    lanes.segmented_lora_(y, x, a, b, index, SCALE)
    out, hidden = lanes.segmented_lora(y, x, a, b, index, SCALE)
    assert out.shape == y.shape and hidden.shape == (*x.shape[:2], a.shape[1] * a.shape[2])
    grads = lanes.segmented_lora_backward(out, x, hidden, a, b, index, SCALE, True)
    assert [grad.shape for grad in grads] == [x.shape, a.shape, b.shape]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_public_function(dtype, device):
    args = make_inputs((20, 24, 3, 16, 8, (1, -1, 0)), dtype, device, factors=torch.float32)
    *tensors, rows = args
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = segmented_lora(*leaves, rows, SCALE)
    grad = torch.randn_like(out)
    eager, exact = gradients(args, grad), gradients(exact_inputs(*args), grad.double())
    for ours, *others in zip(torch.autograd.grad(out, leaves, grad), eager, exact, strict=True):
        assert_as_accurate(ours, *others)


def test_gradcheck():
    *tensors, rows = make_inputs((4, 3, 2, 3, 2, (1, -1, 0)), torch.float64)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *args: segmented_lora(*args, rows, SCALE), leaves)


def test_only_the_factors_may_need_a_gradient(device):
    y, x, a, b, rows = make_inputs((4, 8, 2, 8, 3, (0, -1)), torch.float32, device)
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    segmented_lora(y, x, a, b, rows, SCALE).sum().backward()
    assert a.grad.shape == a.shape and b.grad.shape == b.shape and x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_form_returns_y(dtype, device):
    y, x, a, b, rows = make_inputs((6, 8, 2, 8, 3, (0, -1)), dtype, device)
    expected = segmented_lora(y, x, a, b, rows, SCALE)
    assert segmented_lora_(y, x, a, b, rows, SCALE) is y
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    ops = torch.ops.mfd_fast
    *tensors, rows = make_inputs((6, 8, 2, 8, 3, (0, -1)), dtype, device, factors=torch.float32)
    y, x, a, b = tensors
    torch.library.opcheck(ops.segmented_lora_.default, (y, x, a, b, rows, SCALE))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.library.opcheck(ops.segmented_lora.default, (*leaves, rows, SCALE))
    out, hidden = ops.segmented_lora(*tensors, rows, SCALE)
    for need_x in (True, False):
        args = (out, x, hidden, a, b, rows, SCALE, need_x)
        torch.library.opcheck(ops._segmented_lora_backward.default, args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_sana_shapes(dtype):
    args = make_inputs((1024, 2240, 3, 2240, 64, (-1, -1, 0)), dtype, "cuda")
    y, x, a, b, rows = args
    a, b = a / 2240**0.5, b / 8
    ops = torch.ops.mfd_fast
    args = (y, x, a, b, rows)
    eager = reference.segmented_lora(*args, SCALE)
    exact = reference.segmented_lora(*exact_inputs(*args), SCALE)
    out, hidden = ops.segmented_lora(*args, SCALE)
    assert_as_accurate(out, eager, exact)
    grad = torch.randn_like(out)
    ours = ops._segmented_lora_backward(grad, x, hidden, a, b, rows, SCALE, True)
    eager, exact = gradients(args, grad)[1:], gradients(exact_inputs(*args), grad.double())[1:]
    for actual, yardstick, true in zip(ours, eager, exact, strict=True):
        assert_as_accurate(actual, yardstick, true)


@pytest.mark.gpu
def test_the_choice_of_rows_may_change_under_a_graph():
    y, x, a, b, rows = make_inputs((64, 32, 3, 32, 8, (0, -1, 1)), torch.float32, "cuda")
    static = y.clone()
    segmented_lora_(static, x, a, b, rows, SCALE)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        segmented_lora_(static, x, a, b, rows, SCALE)
    rows.copy_(torch.tensor([-1, 1, 0], dtype=torch.int32))
    static.copy_(y)
    graph.replay()
    assert torch.equal(static, segmented_lora(y, x, a, b, rows, SCALE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x must be \[R, T, Cin\]; got \[2, 5\]"),
        ({"x": torch.zeros(2, 5, 8).int()}, r"x must be .*got torch.int32"),
        ({"x": torch.zeros(2, 8, 5).mT}, r"x must be contiguous .*got strides \[40, 1, 5\]"),
        (
            {"y": torch.zeros(2, 4, 12)},
            r"y must be torch.float32 \[2, 5, 'G \* Cout'\] on cpu; got",
        ),
        ({"y": torch.zeros(2, 5, 12).half()}, r"y must be torch.float32.*got torch.float16"),
        ({"y": torch.zeros(2, 5, 13)}, r"y must hold 2 targets of equal width 6, .*\[2, 5, 13\]"),
        ({"a": torch.zeros(1, 2, 3, 9)}, r"a must be \[K, G, rank, 8\] .*got \[1, 2, 3, 9\]"),
        ({"a": torch.zeros(1, 2, 257, 8)}, r"a must be .* rank 1 to 256; got \[1, 2, 257, 8\]"),
        ({"b": torch.zeros(1, 3, 6, 3)}, r"b must be \[1, 2, Cout, 3\] .*got \[1, 3, 6, 3\]"),
        ({"b": torch.zeros(1, 2, 6, 3).half()}, r"b must be torch.float32 .*got torch.float16"),
        ({"b": torch.zeros(1, 2, 6, 3, device="meta")}, r"b must be .* on cpu; got .* on meta"),
        ({"a": torch.zeros(1, 2, 8, 3).mT}, r"a must be contiguous in its last two .*got strides"),
        ({"rows": torch.zeros(2)}, r"rows must be torch.int32 \[2\] on cpu; got torch.float32"),
        ({"rows": torch.zeros(3).int()}, r"rows must be torch.int32 \[2\] on cpu; got .*\[3\]"),
    ],
)
@pytest.mark.parametrize("function", [segmented_lora, segmented_lora_])
def test_errors_name_argument_expected_and_got(function, change, message):
    args = {
        "y": torch.zeros(2, 5, 12),
        "x": torch.zeros(2, 5, 8),
        "a": torch.zeros(1, 2, 3, 8),
        "b": torch.zeros(1, 2, 6, 3),
        "rows": torch.zeros(2, dtype=torch.int32),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=f"^{function.__name__}: " + message):
        function(**(args | change))


def test_in_place_form_refuses_to_drop_gradients():
    y, x, a, b, rows = make_inputs((4, 8, 1, 8, 3, (0,)), torch.float32)
    a = a.detach().requires_grad_()
    with pytest.raises(ValueError, match=r"must not require gradients .*use segmented_lora or"):
        segmented_lora_(y, x, a, b, rows, SCALE)
    with torch.no_grad():
        segmented_lora_(y, x, a, b, rows, SCALE)
