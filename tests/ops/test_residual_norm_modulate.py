"""The end of a residual branch with the norm that reads it: one operator against its two halves."""

import pytest
import torch
from test_layer_norm_modulate import DTYPES, ROW, SHAPES, bad, make_inputs, named

from mfd_fast.kernels import gated_residual as gated_residual_kernel
from mfd_fast.kernels import layer_norm_modulate as kernel
from mfd_fast.ops import reference, residual_norm_modulate
from mfd_fast.testing.numerics import assert_as_accurate

RESIDUALS = {"gate and bias": (True, True), "gate": (True, False), "bias": (False, True)}


def make_residual(inputs, has_gate, has_bias):
    """A branch like x, the gate of another of the six rows, and a bias."""
    x, scale, *_ = inputs
    gate = scale._base[:, 2] if has_gate else None
    bias = torch.randn(x.shape[-1], device=x.device).to(x.dtype) if has_bias else None
    return torch.randn_like(x), gate, bias


def plain_residual(x, scale, shift, gain, branch, gate, bias, kind):
    """Both results by the reference operators, one after the other."""
    stream = reference.gated_residual(x, branch, gate, bias)
    return stream, reference.layer_norm_modulate(stream, scale, shift, gain, 1e-6, kind)


def residual_gradients(tensors, kind, grads, dtype=None):
    """Autograd of the reference to all that are not None, in ``dtype`` or as given."""
    leaves = [t if t is None else t.detach().to(dtype or t.dtype) for t in tensors]
    leaves = [leaf if leaf is None else leaf.requires_grad_() for leaf in leaves]
    out = plain_residual(*leaves, kind)
    present = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(out, present, [g.to(out[0].dtype) for g in grads])


def check_residual(launch, launch_backward, inputs, residual, kind):
    """Stream, norm and the gradients to x, branch and rows, by the tolerance rule."""
    inputs = tuple(t if t is None else t.detach() for t in inputs)
    tensors = (*inputs, *residual)
    wide = tuple(t if t is None else t.double() for t in tensors)
    y, mean, rstd, stream = launch(*inputs, 1e-6, kind, *residual)
    ours, eager = (stream, y), plain_residual(*tensors, kind)
    for one, two, three in zip(ours, eager, plain_residual(*wide, kind), strict=True):
        assert_as_accurate(one, two, three)

    grad, base = torch.randn(2, *y.shape, device=y.device).to(y.dtype).unbind(0)
    _, scale, _, gain = inputs
    _, gate, _ = residual
    exact = residual_gradients(tensors, kind, (base, grad), torch.float64)
    eager = residual_gradients(tensors, kind, (base, grad))
    names = [i for i, t in enumerate(tensors) if t is not None]  # of eager and exact
    for with_sums in (False, True):
        args = (grad, stream, scale, gain, mean, rstd, kind, with_sums, base, gate)
        for name, ours in enumerate(launch_backward(*args)):
            if ours.numel():
                at = names.index(name)
                assert_as_accurate(ours, eager[at], exact[at])


def whole_op(*args):
    return torch.ops.mfd_fast.layer_norm_modulate(*args)


def whole_backward(*args):
    return torch.ops.mfd_fast._layer_norm_modulate_backward(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", RESIDUALS)
@pytest.mark.parametrize(("shape", "kind"), [(SHAPES[1], "layer"), (SHAPES[2], "rms")])
def test_residual_matches_float64(shape, kind, which, dtype, triton_device):
    inputs = make_inputs(*shape, dtype, triton_device)
    residual = make_residual(inputs, *RESIDUALS[which])
    inputs = named(inputs, kind == "rms")
    launch, launch_backward = kernel.layer_norm_modulate, kernel.layer_norm_modulate_backward
    check_residual(launch, launch_backward, inputs, residual, kind)
    check_residual(whole_op, whole_backward, inputs, residual, kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_the_two_operators(dtype, triton_device):
    """The stream rounded as it is kept, its norm of what is kept: bit for bit."""
    inputs = make_inputs(3, 2, 2240, 1, dtype, triton_device)
    branch, gate, bias = make_residual(inputs, True, True)
    x, scale, shift, _ = inputs
    y, *_, stream = kernel.layer_norm_modulate(
        x, scale, shift, None, 1e-6, "layer", branch, gate, bias
    )
    plain = kernel.layer_norm_modulate(stream, scale, shift, None, 1e-6, "layer")[0]
    assert torch.equal(y, plain)
    if dtype == torch.float32:  # Triton's interpreter rounds to 16 bits otherwise
        assert torch.equal(stream, gated_residual_kernel.gated_residual(x, branch, gate, bias))


@pytest.mark.parametrize("which", RESIDUALS)
def test_gradcheck_of_a_residual(which, device):
    inputs = make_inputs(4, 2, 7, 2, torch.float64, device)
    branch, gate, bias = make_residual(inputs, *RESIDUALS[which])
    tensors = [*inputs[:3], branch, gate, bias]
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]

    def run(x, scale, shift, branch, gate, bias):
        return residual_norm_modulate(x, branch, gate, scale, shift, bias=bias)

    torch.autograd.gradcheck(run, leaves)
    for only in range(2):  # a result that leads nowhere
        torch.autograd.gradcheck(lambda *a, only=only: run(*a)[only], leaves)
    frozen = [t if t is None or i in (0, 3) else t.detach() for i, t in enumerate(leaves)]
    torch.autograd.gradcheck(run, frozen)


def test_the_residual_keeps_one_stream(device):
    x, scale, shift, _ = make_inputs(2, 3, 40, 2, torch.float32, device)
    branch, kept = torch.randn_like(x).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        residual_norm_modulate(x, branch, scale, scale, shift)
    assert kept.count(x.shape) == 1


@pytest.mark.parametrize("which", RESIDUALS)
def test_opcheck_of_a_residual(which, device):
    inputs = make_inputs(4, 2, 16, 2, torch.float32, device)
    branch, gate, bias = make_residual(inputs, *RESIDUALS[which])
    x, scale, shift, _ = inputs
    leaves = x.requires_grad_(), branch.requires_grad_()
    args = (leaves[0], scale, shift, None, 1e-6, "layer", leaves[1], gate, bias)
    torch.library.opcheck(torch.ops.mfd_fast.layer_norm_modulate.default, args)
    with torch.no_grad():
        y, mean, rstd, stream = whole_op(*args)
    args = (y, stream, scale, None, mean, rstd, "layer", False, y, gate)
    torch.library.opcheck(torch.ops.mfd_fast._layer_norm_modulate_backward.default, args)


RESIDUAL_ERRORS = [
    (
        {"branch": torch.zeros(4, 1, 16, dtype=torch.bfloat16)},
        r"branch must be like x, .*\[4, 1, 16\]",
    ),
    ({"branch": torch.zeros(4, 16, 2, dtype=torch.bfloat16).mT}, "branch must be contiguous"),
    ({"gate": ROW[:1]}, r"gate must be \[2, 16\] like scale; got \[1, 16\]"),
    ({"bias": ROW}, r"bias must be contiguous \[16\]; got \[2, 16\]"),
    ({"kind": "batch"}, "kind must be 'layer' or 'rms'; got 'batch'"),
]


@pytest.mark.parametrize(("changes", "message"), RESIDUAL_ERRORS)
def test_error_sentences_of_a_residual(changes, message):
    x, scale, shift, _ = bad()
    arguments = {"x": x, "branch": x, "gate": scale, "scale": scale, "shift": shift} | changes
    with pytest.raises(ValueError, match=f"^residual_norm_modulate: {message}"):
        residual_norm_modulate(**arguments)
