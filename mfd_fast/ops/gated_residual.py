"""The end of a residual branch: ``x + gate_s * (y + bias)`` in one pass.

    out       = x + gate_s * (y + bias)                      s = r // (R / S)
    grad_x    = grad                                          (the same tensor, no kernel)
    grad_y    = gate_s * grad
    grad_gate = sum over a sample's rows of grad * (y + bias)
    grad_bias = sum over samples of gate_s * (sum over rows of grad)

x, y are [R, T, C] (R lanes of T tokens, C channels), gate is [S, C]: S samples, R / S lanes of
each, one after the other; it may be rows of a larger tensor (SANA: of [S, 6, C]).  bias [C] is the
one of the projection that made y, so that its matmul needs no epilogue.  Arithmetic is
float32 (float64 for float64), cast once at the end.

Traffic in bytes, E = R T C elements of b bytes: forward 3 E b, the three eager operators 7 E b;
backward 2 E b, and E b for y only if the gate's gradient is wanted (y is kept only then).  The sums
run in two stages in a fixed order.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import (
    check_activation,
    check_channel_row,
    check_contiguous,
    check_like,
    check_sample_rows,
)
from mfd_fast.ops.dispatch import define, differentiable, wanted

OP = "gated_residual"


def _fake_backward(grad, y, gate, bias, with_sums):
    return (
        torch.empty_like(grad),
        gate.new_empty(gate.shape if with_sums and y is not None else (0,)),
        torch.empty_like(bias) if with_sums and bias is not None else gate.new_empty(0),
    )


def _reference_backward(grad, y, gate, bias, with_sums):
    grad_s, wide_gate = reference.by_sample(grad, gate), reference.wide(gate)
    grad_y = (grad_s * wide_gate.unsqueeze(1)).reshape(grad.shape).to(grad.dtype)
    grad_gate, grad_bias = gate.new_empty(0), gate.new_empty(0)
    if with_sums and y is not None:
        y_s = reference.by_sample(y, gate)
        y_s = y_s if bias is None else y_s + reference.wide(bias)
        grad_gate = (grad_s * y_s).sum(1).to(gate.dtype)
    if with_sums and bias is not None:
        grad_bias = (wide_gate * grad_s.sum(1)).sum(0).to(bias.dtype)
    return grad_y, grad_gate, grad_bias


_forward = define(
    OP,
    "(Tensor x, Tensor y, Tensor gate, Tensor? bias) -> Tensor",
    fake=lambda x, y, gate, bias: torch.empty_like(x),
    reference=reference.gated_residual,
    triton=f"{OP}:{OP}",
)
gradients = define(
    f"_{OP}_backward",
    "(Tensor grad, Tensor? y, Tensor gate, Tensor? bias, bool with_sums) "
    "-> (Tensor grad_y, Tensor grad_gate, Tensor grad_bias)",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=f"{OP}:{OP}_backward",
)


def _setup_context(ctx, inputs, output):
    _, y, gate, bias = inputs
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate, bias)


def _backward(ctx, grad):
    y, gate, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if not any(needs[1:]):
        return grad, None, None, None
    grads = gradients(grad.contiguous(), y, gate, bias, needs[2] or needs[3])
    return grad if needs[0] else None, *wanted(grads, needs[1:])


differentiable(OP, _backward, _setup_context)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x + gate_s * (y + bias)``, like x; gradients to x, y, gate and bias.

    Args:
        x: the stream, ``[R, T, C]``, contiguous, C at most 8192.
        y: the branch, like x.
        gate: ``[S, C]`` with S a divisor of R, any row stride, of x's dtype or float32.
        bias: ``[C]``, of x's dtype or float32, or None.

    ``ValueError`` if a shape, dtype, device or stride is another.
    """
    check_activation(OP, x, "[R, T, C]")
    check_like(OP, "y", y, "x", x)
    check_contiguous(OP, y=y)
    check_sample_rows(OP, "gate", gate, x)
    if bias is not None:
        check_channel_row(OP, "bias", bias, x)
    return _forward(x, y, gate, bias)
