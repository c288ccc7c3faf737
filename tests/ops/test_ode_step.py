"""ode_step_: C++, CUDA C++ and Triton against the float64 reference."""

import pytest
import torch

from mfd_fast.kernels import ode_step as kernel
from mfd_fast.ops import ode_step_, reference
from mfd_fast.testing.numerics import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (S trajectories, L lanes): alone, guided alone, teacher and auxiliary, the same with guidance.
LANES = [(1, 1), (1, 2), (2, 2), (2, 3)]
GUIDANCE = 4.5


def cpp(x, v, history, coef, x_in):
    ode_step_(x, v, history, coef, guidance=GUIDANCE, x_in=x_in)


def triton(x, v, history, coef, x_in):
    kernel.ode_step_(x, v, history, coef, GUIDANCE, x_in)


def cuda(x, v, history, coef, x_in):
    torch.ops.mfd_fast._ode_step__cuda(x, v, history, coef, GUIDANCE, x_in)


@pytest.fixture(params=["cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request, triton_device):
    """(function, device) of every implementation."""
    return {"cpp": (cpp, "cpu"), "triton": (triton, triton_device), "cuda": (cuda, "cuda")}[
        request.param
    ]


def make_inputs(lanes, shape, dtype, device="cpu", batch=2):
    """x, v, history, coef of a two-step solver; x_in filled with a value that must not survive."""
    trajectories, count = lanes
    x, history = torch.randn(2, batch, trajectories, *shape, dtype=torch.float32).unbind(0)
    v = torch.randn(batch, count, *shape).to(dtype)
    coef = torch.randn(batch, 5)
    x_in = torch.full_like(v, float("nan"))
    return [tensor.to(device) for tensor in (x, v, history, coef, x_in)]


def lanes_of(x, v):
    """Every trajectory on its lanes, in the dtype of v."""
    return torch.cat([x[:, :1], x], dim=1).to(v.dtype) if v.shape[1] > x.shape[1] else x.to(v.dtype)


def assert_accurate(run, x, v, history, coef, x_in):
    wide = [None if a is None else a.double() for a in (x, v, history, coef)]
    exact, exact_history = reference.ode_step(*wide, GUIDANCE)
    eager, eager_history = reference.ode_step(x, v, history, coef, GUIDANCE)
    run(x, v, history, coef, x_in)
    assert_as_accurate(x, eager, exact)
    if history is not None:
        assert_as_accurate(history, eager_history, exact_history)
    if x_in is not None:
        assert_as_accurate(x_in, lanes_of(eager, v), lanes_of(exact, wide[1]))
        if x.is_cuda or run is cpp:  # Triton's interpreter truncates to bf16
            assert torch.equal(x_in, lanes_of(x, v)), "the input is not the state"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("has_history", [True, False])
def test_matches_float64(has_history, lanes, dtype, implementation):
    run, device = implementation
    x, v, history, coef, x_in = make_inputs(lanes, (3, 11, 13), dtype, device)
    assert_accurate(run, x, v, history if has_history else None, coef, x_in)


# More than one block and a ragged tail; whole 16-byte packs; one element.
@pytest.mark.parametrize("shape", [(4099,), (2, 32, 32), (1,)])
def test_shapes(shape, implementation):
    run, device = implementation
    assert_accurate(run, *make_inputs((2, 3), shape, torch.bfloat16, device, batch=3))


@pytest.mark.parametrize("lanes", LANES)
def test_input_is_optional(lanes, implementation):
    run, device = implementation
    x, v, _, coef, _ = make_inputs(lanes, (40,), torch.float32, device)
    assert_accurate(run, x, v, None, coef, None)


@pytest.mark.parametrize("value", ["large", "tiny", "zero"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(dtype, value, implementation):
    run, device = implementation
    info = torch.finfo(dtype)
    # Guidance 4.5 of opposite signs reaches 8 times the largest velocity.
    scale = {"large": info.max / 32, "tiny": 4 * info.tiny, "zero": 0.0}[value]
    x, v, history, coef, x_in = make_inputs((2, 3), (70,), dtype)
    x, history, v = (torch.sign(a) * scale * torch.rand_like(a) for a in (x, history, v))
    coef = torch.tensor([[1.0, -0.02, 0.5, 0.0, 1.0]]).expand(2, 5).contiguous()
    args = (x, v.to(dtype), history, coef, x_in)
    assert_accurate(run, *(tensor.to(device) for tensor in args))


def test_euler_step_is_x_minus_dt_v(implementation):
    run, device = implementation
    x, v, _, _, x_in = make_inputs((1, 1), (64,), torch.float32, device)
    coef = torch.tensor([[1.0, -0.5, 0.0, 0.0, 1.0]], device=device).repeat(2, 1)
    expected = x - 0.5 * v
    run(x, v, None, coef, x_in)
    assert torch.equal(x, expected)


def test_a_prefix_of_the_batch_leaves_the_rest_alone(device):
    x, v, history, coef, x_in = make_inputs((2, 3), (5, 7), torch.bfloat16, device, batch=3)
    before = [a[2:].clone() for a in (x, history, x_in)]
    args = (x[:2], v[:2], history[:2], coef[:2])
    ode_step_(*args, guidance=GUIDANCE, x_in=x_in[:2])
    for now, then in zip((x[2:], history[2:], x_in[2:]), before, strict=True):
        assert torch.equal(now, then) or now.isnan().all()


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("batch", [0, 2])
def test_empty(batch, shape, implementation):
    run, device = implementation
    run(*make_inputs((2, 3), shape if batch else (3,), torch.bfloat16, device, batch=batch))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("has_history", [True, False])
def test_opcheck(has_history, lanes, device):
    x, v, history, coef, x_in = make_inputs(lanes, (5, 3), torch.bfloat16, device)
    args = (x, v, history if has_history else None, coef, GUIDANCE, torch.zeros_like(x_in))
    torch.library.opcheck(torch.ops.mfd_fast.ode_step_.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 4, 8)}, r"v must be \[B, S or S \+ 1, ...\].*got \[2, 4, 8\]"),
        ({"v": torch.zeros(2, 3, 9)}, r"v must be .*got \[2, 3, 9\]"),
        (
            {"coef": torch.zeros(2, 3)},
            r"coef must be torch.float32 \[2, 5\] on cpu; got .*\[2, 3\]",
        ),
        ({"coef": torch.zeros(2, 5).double()}, r"coef must be torch.float32.*got torch.float64"),
        ({"history": torch.zeros(2, 2, 9)}, r"history must be .*got torch.float32 \[2, 2, 9\]"),
        ({"x_in": torch.zeros(2, 3, 8).half()}, r"x_in must be torch.float32.*got torch.float16"),
        ({"x": torch.zeros(2, 2, 8).half()}, r"x must be torch.float32 for v.*got torch.float16"),
        ({"v": torch.zeros(2, 3, 8, device="meta")}, r"v must be on cpu; got meta"),
        ({"v": torch.zeros(2, 8, 3).transpose(1, 2)}, r"v must be contiguous"),
        ({"history": torch.zeros(2, 8, 2).mT}, r"history must be contiguous"),
    ],
)
def test_errors_name_argument_expected_and_got(change, message):
    args = {"x": torch.zeros(2, 2, 8), "v": torch.zeros(2, 3, 8)}
    args |= {"history": None, "coef": torch.zeros(2, 5)} | change
    with pytest.raises(ValueError, match="^ode_step_: " + message):
        ode_step_(**args)
