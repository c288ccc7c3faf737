"""mfd_loss: C++, CUDA C++ and Triton against the float64 reference."""

import pytest
import torch

from mfd_fast.kernels import mfd_loss as kernel
from mfd_fast.ops import mfd_loss, mfd_loss_from_ends, reference
from mfd_fast.ops.extension import has_ext
from mfd_fast.testing.numerics import assert_as_accurate

# Several blocks of every implementation with a ragged tail, whole 16-byte packs, odd, one element.
SHAPES = [(3, 9001), (2, 4, 32, 32), (2, 3, 5, 7), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cpp(*args):
    return torch.ops.mfd_fast.mfd_loss(*args)


def cuda(*args):
    return torch.ops.mfd_fast._mfd_loss_cuda(*args)


@pytest.fixture(params=["cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request, triton_device):
    """(function, device) of every implementation."""
    triton = kernel.mfd_loss
    return {"cpp": (cpp, "cpu"), "triton": (triton, triton_device), "cuda": (cuda, "cuda")}[
        request.param
    ]


def make_inputs(shape, dtype, device="cpu", has_weight=True):
    """x leans towards the difference, as a loss that has something to learn does."""
    teacher, aux, x = torch.randn(3, *shape).unbind(0)
    x = 0.5 * x + 0.5 * (aux - teacher)
    span = 0.1 + torch.rand(shape[0])
    weight = torch.rand(shape[0]) if has_weight else None
    tensors = [a.to(dtype) for a in (x, teacher, aux)] + [span, weight]
    return [None if a is None else a.to(device) for a in tensors]


def widened(args, dtype):
    return [None if a is None else a.to(dtype) for a in args]


def assert_accurate(run, args):
    x = args[0]
    exact = reference.mfd_loss(*widened(args, torch.float64))
    loss, distance, grad = reference.mfd_loss(*widened(args, torch.float32))
    eager = (loss, distance, grad.to(x.dtype))
    for ours, theirs, true in zip(run(*args), eager, exact, strict=True):
        assert_as_accurate(ours, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_weight", [True, False])
def test_matches_float64(has_weight, shape, dtype, implementation):
    run, device = implementation
    assert_accurate(run, make_inputs(shape, dtype, device, has_weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["large", "tiny", "zero"])
def test_extreme_values(value, dtype, implementation):
    run, device = implementation
    # Where the sum of squares of eager fp32 still stays in range.
    info = torch.finfo(torch.float32)
    bound = min(info.max**0.5 / 256, torch.finfo(dtype).max / 16)
    scale = {"large": bound, "tiny": max(info.tiny**0.5, torch.finfo(dtype).tiny), "zero": 0.0}
    args = make_inputs((2, 1031), dtype)
    args[:3] = [(a.double() * scale[value]).to(dtype) for a in args[:3]]
    assert_accurate(run, [a.to(device) for a in args])


@pytest.mark.parametrize("n", [(4, 8, 8), (21,)])
def test_ends_may_be_planes_of_one_buffer(n, implementation):
    run, device = implementation
    x, teacher, aux, span, weight = make_inputs((3, *n), torch.float32, device)
    states = torch.stack([teacher, aux], dim=1)
    args = (x, states[:, 0], states[:, 1], span, weight)
    assert_accurate(run, args)
    ours = run(*args)
    copies = run(x, states[:, 0].contiguous(), states[:, 1].contiguous(), span, weight)
    for a, b in zip(ours, copies, strict=True):
        assert_as_accurate(a, b, b.double())


def test_misaligned_rows(implementation):
    run, device = implementation
    args = make_inputs((1, 3001), torch.bfloat16, device)
    args[:3] = [a[:, 1:] for a in args[:3]]
    assert_accurate(run, args)


def test_same_bits_every_time(implementation):
    run, device = implementation
    args = make_inputs((5, 8191), torch.float32, device)
    first = run(*args)
    for again in (run(*args) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not has_ext(), reason="needs the compiled operators (mfd_fast._C)")
def test_same_bits_on_any_number_of_threads():
    args = make_inputs((3, 40000), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpp(*args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_empty(shape, implementation):
    run, device = implementation
    loss, distance, grad = run(*make_inputs(shape, torch.float32, device))
    assert loss.item() == 0.0
    assert torch.equal(distance, torch.zeros(shape[0], device=device))
    assert grad.shape == shape


def test_loss_of_the_method_is_the_mean_of_the_product(device):
    x, u_teacher, u_aux, *_ = make_inputs((3, 50), torch.float32, device)
    expected = ((u_teacher - u_aux) * x).mean()
    exact = ((u_teacher.double() - u_aux.double()) * x.double()).mean()
    assert_as_accurate(mfd_loss(x, u_teacher, u_aux), expected, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_matches_float64(dtype, device):
    args = make_inputs((3, 65), dtype, device)

    def gradient(dtype):
        wide = widened(args, dtype)
        wide[0].requires_grad_()
        return torch.autograd.grad(3.0 * reference.mfd_loss(*wide)[0], wide[0])[0]

    x = args[0].clone().requires_grad_()
    (ours,) = torch.autograd.grad(3.0 * mfd_loss_from_ends(x, *args[1:])[0], x)
    assert_as_accurate(ours, gradient(torch.float32).to(dtype), gradient(torch.float64))


def test_gradcheck():
    x, teacher, aux, span, weight = make_inputs((2, 3, 2), torch.float64)
    span, weight = span.float(), weight.float()
    assert torch.autograd.gradcheck(
        lambda x: mfd_loss_from_ends(x, teacher, aux, span, weight)[0], (x.requires_grad_(),)
    )


def test_ends_are_stop_gradient(device):
    x, u_teacher, u_aux, *_ = make_inputs((2, 9), torch.float32, device)
    for tensor in (x, u_teacher, u_aux):
        tensor.requires_grad_()
    mfd_loss(x, u_teacher, u_aux).backward()
    assert x.grad is not None
    assert u_teacher.grad is None
    assert u_aux.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_weight", [True, False])
def test_opcheck(has_weight, dtype, device):
    x, teacher, aux, span, weight = make_inputs((2, 5, 3), dtype, device, has_weight)
    args = (x.requires_grad_(), teacher, aux, span, weight)
    torch.library.opcheck(torch.ops.mfd_fast.mfd_loss.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end_aux": torch.zeros(2, 9)}, r"end_aux must be like x, torch.float32 \[2, 8\]"),
        ({"end_teacher": torch.zeros(2, 8).half()}, r"end_teacher .*got torch.float16 \[2, 8\]"),
        ({"end_teacher": torch.zeros(2, 8, device="meta")}, r"end_teacher .* on cpu; got .*meta"),
        ({"span": torch.zeros(3)}, r"span must be torch.float32 \[2\] on cpu; got .*\[3\]"),
        ({"weight": torch.zeros(2).double()}, r"weight must be torch.float32.*got torch.float64"),
        ({"weight": torch.zeros(2, device="meta")}, r"weight must be .* on cpu; got .* on meta"),
        ({"x": torch.zeros(())}, r"x must be \[B, ...\]; got a scalar"),
    ],
)
def test_errors_name_argument_expected_and_got(change, message):
    args = dict.fromkeys(("x", "end_teacher", "end_aux"), torch.zeros(2, 8))
    args |= {"span": torch.ones(2)} | change
    with pytest.raises(ValueError, match="^mfd_loss: " + message):
        mfd_loss_from_ends(**args)
