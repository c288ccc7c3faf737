"""interpolate: C++, CUDA C++ and Triton against the float64 reference."""

import pytest
import torch

from mfd_fast.kernels import interpolate as kernel
from mfd_fast.ops import interpolate, interpolate_with_target, reference
from mfd_fast.testing.numerics import assert_as_accurate

# SANA's latent is [B, 32, 32, 32]; here: whole blocks, a ragged tail, odd rows, one element.
SHAPES = [(2, 4, 32, 32), (3, 4099), (2, 3, 5, 7), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cpp(x0, noise, t, with_target=True):
    return torch.ops.mfd_fast.interpolate(x0, noise, t, with_target)


def triton(x0, noise, t, with_target=True):
    return kernel.interpolate(x0, noise, t, with_target)


def cuda(x0, noise, t, with_target=True):
    return torch.ops.mfd_fast._interpolate_cuda(x0, noise, t, with_target)


@pytest.fixture(params=["cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request, triton_device):
    """(function, device) of every implementation."""
    return {"cpp": (cpp, "cpu"), "triton": (triton, triton_device), "cuda": (cuda, "cuda")}[
        request.param
    ]


def make_inputs(shape, dtype, device="cpu"):
    x0, noise = torch.randn(2, *shape).to(dtype).to(device).unbind(0)
    return x0, noise, torch.rand(shape[0]).to(device)


def assert_accurate(run, args):
    exact = reference.interpolate(*(x.double() for x in args))
    for ours, eager, true in zip(run(*args), reference.interpolate(*args), exact, strict=True):
        assert_as_accurate(ours, eager, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, implementation):
    run, device = implementation
    assert_accurate(run, make_inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["large", "tiny", "zero"])
def test_extreme_values(value, dtype, implementation):
    run, device = implementation
    info = torch.finfo(dtype)
    scale = {"large": 0.4 * info.max, "tiny": 4 * info.tiny, "zero": 0.0}[value]
    x0, noise = ((2 * torch.rand(2, 2, 515) - 1).double() * scale).to(dtype).to(device).unbind(0)
    assert_accurate(run, (x0, noise, torch.tensor([0.25, 1.0], device=device)))


def test_the_ends_are_data_and_noise(implementation):
    run, device = implementation
    x0, noise, _ = make_inputs((2, 33), torch.float32, device)
    x_t, target = run(x0, noise, torch.tensor([0.0, 1.0], device=device))
    assert torch.equal(x_t, torch.stack([x0[0], noise[1]]))
    assert torch.equal(target, noise - x0)


def test_misaligned_rows(implementation):
    run, device = implementation
    x0, noise, t = make_inputs((1, 1025), torch.bfloat16, device)
    assert_accurate(run, (x0[:, 1:], noise[:, 1:], t))


def test_without_target_there_is_none(implementation):
    run, device = implementation
    args = make_inputs((2, 40), torch.float32, device)
    x_t, target = run(*args, False)
    assert target.numel() == 0
    assert torch.equal(x_t, run(*args)[0])


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_empty(shape, implementation):
    run, device = implementation
    x_t, target = run(*make_inputs(shape, torch.float32, device))
    assert x_t.shape == target.shape == shape


def test_non_contiguous_inputs_are_handled(device):
    x0, noise, t = make_inputs((4, 6, 8), torch.float32, device)
    strided = interpolate(x0.transpose(1, 2), noise.transpose(1, 2), t)
    assert torch.equal(strided, interpolate(x0, noise, t).transpose(1, 2))


@pytest.mark.parametrize("with_target", [True, False])
def test_gradcheck(with_target, device):
    x0, noise, t = make_inputs((2, 3, 2), torch.float64, device)
    function = interpolate_with_target if with_target else interpolate
    assert torch.autograd.gradcheck(lambda x: function(x, noise, t), (x0.requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_matches_float64(dtype, device):
    x0, noise, t = make_inputs((3, 65), dtype, device)
    weights = torch.randn(2, *x0.shape).to(dtype).to(device)

    def gradient(function, *args):
        x = args[0].clone().requires_grad_()
        outputs = function(x, *args[1:])
        return torch.autograd.grad(outputs, x, list(weights.to(x.dtype)))[0]

    exact = gradient(reference.interpolate, x0.double(), noise.double(), t.double())
    eager = gradient(reference.interpolate, x0, noise, t)
    assert_as_accurate(gradient(interpolate_with_target, x0, noise, t), eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_target", [True, False])
def test_opcheck(with_target, dtype, device):
    x0, noise, t = make_inputs((2, 5, 3), dtype, device)
    args = (x0.requires_grad_(), noise, t, with_target)
    torch.library.opcheck(torch.ops.mfd_fast.interpolate.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(2, 9)}, r"noise must be like x0, torch.float32 \[2, 8\]"),
        ({"noise": torch.zeros(2, 8).half()}, r"got torch.float16 \[2, 8\]"),
        ({"t": torch.zeros(3)}, r"t must be torch.float32 \[2\] on cpu; got torch.float32 \[3\]"),
        ({"t": torch.zeros(2).bfloat16()}, r"t must be torch.float32 \[2\].*got torch.bfloat16"),
        (
            {"noise": torch.zeros(2, 8, device="meta")},
            r"on cpu; got torch.float32 \[2, 8\] on meta",
        ),
        ({"x0": torch.zeros(())}, r"x0 must be \[B, ...\]; got a scalar"),
    ],
)
def test_errors_name_argument_expected_and_got(change, message):
    args = {"x0": torch.zeros(2, 8), "noise": torch.zeros(2, 8), "t": torch.zeros(2)} | change
    with pytest.raises(ValueError, match="^interpolate: .*" + message):
        interpolate(**args)
