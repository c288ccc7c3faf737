"""x + gate * (y + bias): the operator and its Triton kernels against float64."""

import pytest
import torch

from mfd_fast.kernels import gated_residual as kernel
from mfd_fast.ops import gated_residual, reference
from mfd_fast.testing.numerics import assert_as_accurate

from capture import assert_captured_equals_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (lanes, tokens, channels, samples): narrow rows, three lanes of two samples with a ragged row,
# more rows than a tile, and SANA's width (its last block of columns is ragged).
SHAPES = [(6, 7, 60, 3), (6, 5, 77, 2), (2, 40, 300, 2), (2, 9, 2240, 1)]


def make_inputs(lanes, tokens, channels, samples, dtype, device):
    """x, y, gate and bias as SANA has them: the gate is one of the six rows of one tensor."""
    x, y = torch.randn(2, lanes, tokens, channels, device=device).to(dtype).unbind(0)
    gate = torch.randn(samples, 6, channels, device=device).to(dtype)[:, 2]
    return x, y, gate, torch.randn(channels, device=device).to(dtype)


def gradients(inputs, grad, dtype=None):
    """Autograd of the reference to y, gate and bias, in ``dtype`` or as given."""
    leaves = [x if x is None else x.to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = reference.gated_residual(*leaves)
    present = [leaf for leaf in leaves[1:] if leaf is not None]
    return torch.autograd.grad(out, present, grad.to(out.dtype))


def op(*args):
    return torch.ops.mfd_fast.gated_residual(*args)


def op_backward(*args):
    return torch.ops.mfd_fast._gated_residual_backward(*args)


def check(launch, launch_backward, inputs, grad=None):
    """Forward and every gradient, by the tolerance rule; the gradient is drawn if not given."""
    inputs = tuple(x if x is None else x.detach() for x in inputs)
    wide = tuple(x if x is None else x.double() for x in inputs)
    out = launch(*inputs)
    assert_as_accurate(out, reference.gated_residual(*inputs), reference.gated_residual(*wide))

    grad = torch.randn_like(out) if grad is None else grad
    ours = launch_backward(grad, *inputs[1:], True)
    eager = gradients(inputs, grad)
    exact = gradients(inputs, grad, torch.float64)
    for one, two, three in zip(ours, eager, exact, strict=False):
        assert_as_accurate(one, two, three)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_float64(shape, has_bias, dtype, triton_device):
    x, y, gate, bias = make_inputs(*shape, dtype, triton_device)
    inputs = (x, y, gate, bias if has_bias else None)
    check(kernel.gated_residual, kernel.gated_residual_backward, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_matches_float64(shape, has_bias, dtype, device):
    x, y, gate, bias = make_inputs(*shape, dtype, device)
    check(op, op_backward, (x, y, gate, bias if has_bias else None))


def test_reference_is_the_plain_formula():
    x, y, gate, bias = make_inputs(6, 5, 77, 2, torch.float32, "cpu")

    def plain(x, y, gate, bias):
        return x + gate.repeat_interleave(3, 0).unsqueeze(1) * (y + bias)

    wide = (x.double(), y.double(), gate.double(), bias.double())
    actual = reference.gated_residual(x, y, gate, bias)
    assert_as_accurate(actual, plain(x, y, gate, bias), plain(*wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_may_be_float32_beside_a_half_precision_stream(dtype, triton_device):
    x, y, *_ = make_inputs(4, 3, 70, 2, dtype, triton_device)
    *_, gate, bias = make_inputs(4, 3, 70, 2, torch.float32, triton_device)
    check(kernel.gated_residual, kernel.gated_residual_backward, (x, y, gate, bias))
    check(op, op_backward, (x, y, gate, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 1e-7, 1e-30, 1e15])
def test_extreme_values(factor, dtype, triton_device):
    if dtype == torch.float16 and factor == 1e15:
        x, *rest = make_inputs(4, 3, 70, 2, dtype, triton_device)
        inputs = (x.clamp(-3, 3) * 2e4, *rest)  # a product of two such overflows
    else:
        inputs = make_inputs(4, 3, 70, 2, dtype, triton_device)
        inputs = tuple((x * factor).to(dtype) for x in inputs)
    check(kernel.gated_residual, kernel.gated_residual_backward, inputs)
    check(op, op_backward, inputs)


@pytest.mark.parametrize("programs", [1, 6, 1000])
def test_sums_do_not_depend_on_how_the_rows_are_divided(programs, triton_device, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    inputs = make_inputs(4, 70, 130, 2, torch.float32, triton_device)
    check(kernel.gated_residual, kernel.gated_residual_backward, inputs)


def test_backward_is_bitwise_reproducible(triton_device):
    x, y, gate, bias = make_inputs(4, 50, 96, 2, torch.float32, triton_device)
    args = (torch.randn_like(x), y, gate, bias, True)
    first, second = (kernel.gated_residual_backward(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_beside_the_tensors_is_not_read(triton_device):
    def surrounded(x):
        size = x.numel()
        buffer = torch.full((size + 512,), float("nan"), device=x.device)
        buffer[256 : 256 + size] = x.flatten()
        return buffer[256 : 256 + size].view(x.shape)

    inputs = make_inputs(3, 3, 77, 3, torch.float32, triton_device)
    inputs = tuple(surrounded(x) for x in inputs)
    check(kernel.gated_residual, kernel.gated_residual_backward, inputs)


@pytest.mark.parametrize("channels", [1, 5])
def test_small_integers_are_exact(channels, triton_device):
    inputs = make_inputs(6, 7, channels, 3, torch.float32, triton_device)
    x, y, gate, bias = (t.mul(4).round() for t in inputs)
    assert torch.equal(kernel.gated_residual(x, y, gate, bias), op(x, y, gate, bias))
    ours = kernel.gated_residual_backward(x, y, gate, bias, True)
    theirs = gradients((x, y, gate, bias), x)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_gate_of_zero_is_the_identity(device):
    x, y, gate, bias = make_inputs(4, 3, 40, 2, torch.bfloat16, device)
    assert torch.equal(gated_residual(x, y, torch.zeros_like(gate), bias), x)


def test_a_sample_gates_its_own_lanes(device):
    x, y, gate, bias = make_inputs(6, 4, 32, 3, torch.float32, device)
    out = gated_residual(x, y, gate, bias)
    for sample in range(3):
        lanes, own = slice(2 * sample, 2 * sample + 2), slice(sample, sample + 1)
        assert torch.equal(out[lanes], gated_residual(x[lanes], y[lanes], gate[own], bias))


def test_strided_gate_equals_its_copy(device):
    x, y, gate, bias = make_inputs(4, 3, 40, 2, torch.float32, device)
    assert not gate.is_contiguous()
    expected = gated_residual(x, y, gate.contiguous(), bias)
    assert torch.equal(gated_residual(x, y, gate, bias), expected)


def test_the_stream_receives_the_gradient_itself(device):
    x, y, gate, bias = make_inputs(2, 3, 40, 2, torch.bfloat16, device)
    x.requires_grad_()
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(gated_residual(x, y, gate, bias), x, grad)[0], grad)


@pytest.mark.parametrize("wanted", ["y", "gate", "bias", "gate bias", "x y gate bias"])
def test_gradients_that_are_wanted_equal_all_of_them(wanted, device):
    inputs = dict(
        zip(
            ("x", "y", "gate", "bias"), make_inputs(4, 3, 20, 2, torch.float64, device), strict=True
        )
    )
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    grad = torch.randn_like(inputs["x"])
    out = gated_residual(*leaves.values())
    expected = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    some = {n: t.clone().requires_grad_(n in wanted.split()) for n, t in inputs.items()}
    names = [name for name in some if name in wanted.split()]
    grads = torch.autograd.grad(gated_residual(*some.values()), [some[n] for n in names], grad)
    assert all(torch.equal(g, expected[n]) for n, g in zip(names, grads, strict=True))


def test_a_frozen_gate_does_not_keep_the_branch(device):
    x, y, gate, bias = make_inputs(2, 3, 40, 2, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        gated_residual(x, y.requires_grad_(), gate, bias)
    assert y.shape not in kept


def test_gradcheck(device):
    inputs = make_inputs(4, 2, 7, 2, torch.float64, device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.autograd.gradcheck(gated_residual, leaves)
    torch.autograd.gradcheck(gated_residual, leaves[:3])


@pytest.mark.parametrize("lanes", [0, 4])
def test_empty_batch(lanes, triton_device):
    samples = 2 if lanes else 0
    x, y, gate, bias = make_inputs(lanes, 0, 16, samples, torch.bfloat16, triton_device)
    for launch, backward in (
        (kernel.gated_residual, kernel.gated_residual_backward),
        (op, op_backward),
    ):
        assert launch(x, y, gate, bias).shape == (lanes, 0, 16)
        grads = backward(x, y, gate, bias, True)
        assert [tuple(g.shape) for g in grads] == [(lanes, 0, 16), (samples, 16), (16,)]
        assert all(not g.any() for g in grads)
    assert gated_residual(x, y, gate).shape == (lanes, 0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_opcheck(has_bias, dtype, device):
    x, y, gate, bias = make_inputs(4, 2, 16, 2, dtype, device)
    bias = bias.requires_grad_() if has_bias else None
    args = (x.detach().requires_grad_(), y.detach().requires_grad_(), gate, bias)
    torch.library.opcheck(torch.ops.mfd_fast.gated_residual.default, args)
    gate, bias = gate.detach(), bias if bias is None else bias.detach()
    backward = torch.ops.mfd_fast._gated_residual_backward.default
    for kept, with_sums in ((y.detach(), True), (None, True), (None, False)):
        torch.library.opcheck(backward, (x.detach(), kept, gate, bias, with_sums))


X = torch.zeros(4, 2, 16, dtype=torch.bfloat16)
ERRORS = [
    ({"x": X[0]}, r"x must be \[R, T, C\]; got \[2, 16\]"),
    ({"x": X.mT.contiguous().mT}, "x must be contiguous"),
    ({"y": X[:2]}, r"y must be like x, .*\[4, 2, 16\] on cpu; got .*\[2, 2, 16\]"),
    ({"y": X.float()}, "y must be like x.*got torch.float32"),
    ({"y": X.mT.contiguous().mT}, "y must be contiguous"),
    ({"y": X.to("meta")}, "y must be like x.* on cpu; got .* on meta"),
    ({"gate": X[0]}, None),
    ({"gate": X[0, :, :8]}, r"gate must be \[S, 16\]; got \[2, 8\]"),
    ({"gate": X[:3, 0]}, "gate must have S rows with S a divisor of the 4 lanes of x; got S = 3"),
    ({"gate": X[:2, 0].double()}, "gate must be torch.bfloat16 or torch.float32"),
    ({"bias": X[0, :1]}, r"bias must be contiguous \[16\]; got \[1, 16\]"),
    ({"bias": X[0, 0].half()}, "bias must be torch.bfloat16 or torch.float32"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_error_sentences(changes, message):
    arguments = {"x": X, "y": X, "gate": X[:2, 0], "bias": X[0, 0]} | changes
    if message is None:
        assert gated_residual(**arguments).shape == X.shape
        return
    with pytest.raises(ValueError, match=f"^gated_residual: {message}"):
        gated_residual(**arguments)


@pytest.mark.gpu
def test_captured_step_equals_the_eager_one():
    x, y, gate, bias = make_inputs(3, 64, 2240, 1, torch.bfloat16, "cuda")
    y.requires_grad_()

    def step():
        out = gated_residual(x, y, gate, bias)
        return out, torch.autograd.grad(out, y, torch.ones_like(out))[0]

    assert_captured_equals_eager(step)
