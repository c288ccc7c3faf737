"""float64 in means float64 throughout: times, coefficients, gradients, and the operators on CUDA.

Whatever is rounded to float32 on the way shows as an error of 1e-8 where 1e-15 is expected.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfd_fast import ops
from mfd_fast.flow.integrate import generate, mean_velocity
from mfd_fast.flow.solvers import SOLVERS
from mfd_fast.flow.times import dpm_flow_schedule, shifted_schedule
from mfd_fast.ops import reference
from mfd_fast.ops.linear_attention import WIDTHS
from mfd_fast.testing.numerics import assert_as_accurate


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
def test_noising_and_its_gradient(t_dtype):
    x0, noise, grad, t = rand(5, 7).requires_grad_(), rand(5, 7), rand(5, 7), rand(5).to(t_dtype)
    column = t.double()[:, None]
    exact, exact_grad = (1 - column) * x0.detach() + column * noise, (1 - column) * grad
    for function in (ops.interpolate, lambda *a: reference.interpolate(*a)[0]):
        x_t = function(x0, noise, t)
        assert_as_accurate(x_t.detach(), exact, exact)
        assert_as_accurate(torch.autograd.grad(x_t, x0, grad)[0], exact_grad, exact_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solver_step_and_guidance(dtype):
    x, v, coef, guidance = rand(3, 1, 9), rand(3, 2, 9), rand(3, 5).to(dtype), 1.1
    a, b = coef.double()[:, :2, None].unbind(1)
    exact = a * x[:, 0] + b * (v[:, 1] + guidance * (v[:, 0] - v[:, 1]))
    ops.ode_step_(x, v, None, coef, guidance=guidance)
    assert_as_accurate(x[:, 0], exact, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_its_gradient(dtype):
    x, teacher, aux = rand(3, 3, 9).unbind(0)
    span, weight = (0.1 + rand(2, 3).to(dtype)).unbind(0)
    diff = (aux - teacher) / span.double()[:, None]
    _, distance, grad = ops.mfd_loss_from_ends(x, teacher, aux, span, weight)
    assert_as_accurate(distance, diff.norm(dim=1), diff.norm(dim=1))
    exact = diff * weight.double()[:, None] / x.numel()
    assert_as_accurate(grad, exact, exact)


@pytest.mark.parametrize("with_cond", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_mean_velocity(solver, with_cond):
    """A constant velocity is its own mean for every solver."""
    x, constant, (r, t), h = rand(6, 5), rand(6, 5), rand(2, 6).sort(dim=0).values, 0.13
    velocity = (lambda x, time, rows: rows) if with_cond else (lambda x, time: constant)
    call = {"cond": constant} if with_cond else {}
    u = mean_velocity(velocity, x, t, r, step_size=h, solver=solver, **call)

    end, span = x, (t - r)[:, None]
    steps = (span / h).ceil()
    for k in range(int(steps.max())):
        end = torch.where(k < steps, end - span / steps * constant, end)
    # What the rounding of the states, of order 1, does is divided by the interval.
    assert_as_accurate(u * span, x - end, constant * span)


@pytest.mark.parametrize("solver", SOLVERS)
def test_mean_velocity_of_equal_times(solver):
    x, t = rand(6, 5), rand(6)

    def velocity(x, time):
        return x * time.cos()[:, None]

    assert torch.equal(mean_velocity(velocity, x, t, t, solver=solver), velocity(x, t))


@pytest.mark.parametrize("schedule", [shifted_schedule(3, shift=1.7), dpm_flow_schedule(3)])
@pytest.mark.parametrize("with_grad", [True, False])
def test_generate(schedule, with_grad):
    noise, constant, seen = rand(4, 5), rand(4, 5), []

    def velocity(x, t):
        seen.append(t[0].item())
        return constant

    with torch.set_grad_enabled(with_grad):
        x = generate(velocity, noise, steps=3, schedule=schedule)
    exact = noise - schedule.nodes[0] * constant
    assert_as_accurate(x, exact, exact)
    assert tuple(seen) == schedule.times


class OnCuda(TorchDispatchMode):
    """Runs what is registered for CUDA, on CPU tensors."""

    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        key = torch._C.DispatchKey.CUDA
        name = function.name()
        if not name.startswith("mfd_fast::") or not torch._C._dispatch_has_kernel_for_dispatch_key(
            name, key.name
        ):
            return function(*args, **(kwargs or {}))
        self.calls.add(name.removeprefix("mfd_fast::"))
        return function.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))


def tokens(*shape):
    return 2 * rand(*shape) - 1


# Operator: a function of its differentiable inputs, and these.
CASES = {
    "interpolate": (
        lambda x0: ops.interpolate_with_target(x0, rand(2, 6), rand(2)),
        [tokens(2, 6)],
    ),
    "mfd_loss": (
        lambda x: ops.mfd_loss_from_ends(x, rand(2, 6), rand(2, 6), 0.5 + rand(2))[0],
        [tokens(2, 6)],
    ),
    "gated_residual": (ops.gated_residual, [tokens(2, 3, 4), tokens(2, 3, 4), tokens(1, 4)]),
    "layer_norm_modulate": (
        ops.layer_norm_modulate,
        [tokens(2, 3, 4), tokens(1, 4), tokens(1, 4)],
    ),
    "residual_norm_modulate": (
        ops.residual_norm_modulate,
        [tokens(2, 3, 4), tokens(2, 3, 4), tokens(1, 4), tokens(1, 4), tokens(1, 4)],
    ),
    "rms_norm_rotary": (
        lambda x: ops.rms_norm_rotary(x, None, *2 * [rand(1, 3, 2)]),
        [tokens(2, 3, 1, 4)],
    ),
    "rms_norm_modulate_silu": (ops.rms_norm_modulate_silu, [tokens(2, 3, 4), tokens(4)]),
    "linear_attention": (
        ops.linear_attention,
        [0.1 + rand(1, 3, 1, WIDTHS[0]), 0.1 + rand(1, 3, 1, WIDTHS[0]), rand(1, 3, 1, WIDTHS[0])],
    ),
    "glu_depthwise": (
        lambda x, weight, bias: ops.glu_depthwise(x, weight, bias, 2, 2),
        [tokens(1, 4, 4), tokens(4, 1, 3, 3), tokens(4)],
    ),
    "short_attention": (ops.short_attention, [tokens(2, 3, 1, 4) for _ in "qkv"]),
}


@contextmanager
def same_numbers():
    """What a case draws anew is the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


@pytest.mark.parametrize("operator", CASES)
def test_operators_on_cuda(operator):
    """The kernels there know no float64; gradcheck sees 1e-6 of anything narrower."""
    function, inputs = CASES[operator]

    def seeded(*args):
        with same_numbers():
            return function(*args)

    mode = OnCuda()
    with mode:
        torch.autograd.gradcheck(seeded, [x.clone().requires_grad_() for x in inputs])
    name = operator.replace("residual_norm", "layer_norm")  # one operator, with a residual or not
    assert name in mode.calls


def test_solver_step_on_cuda():
    x, v, coef = rand(3, 1, 9), rand(3, 2, 9), rand(3, 5)
    exact = reference.ode_step(x, v, None, coef, 1.1)[0]
    with OnCuda() as mode:
        ops.ode_step_(x, v, None, coef, guidance=1.1)
    assert mode.calls == {"ode_step_"} and torch.equal(x, exact)


def test_every_operator_that_takes_float64_is_here():
    refused = {"quantize_rows", "segmented_lora"}  # they say so
    refused |= {"renormalised_guidance"}  # has no gradient; in its own tests
    assert {*CASES, "ode_step"} | refused == {
        name.rstrip("_") for name in ops.__all__
        if not name.endswith(("_with_target", "_from_ends", "_qkv"))
    }  # fmt: skip
