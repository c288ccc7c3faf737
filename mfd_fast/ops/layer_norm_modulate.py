"""LayerNorm (or RMS norm with gain) and modulation per sample, in one pass.

    y = norm(x) [* gain] * (1 + scale_s) + shift_s          s = r // (R / S)

    kind "layer"  norm(x) = (x - mean) / sqrt(var + eps) over the channels, population variance
    kind "rms"    norm(x) = x / sqrt(mean(x^2) + eps)

x is [R, T, C] (R lanes of T tokens, C channels), scale and shift are [S, C]: S samples, R / S lanes
of each, one after the other.  They may be rows of a larger tensor (SANA: of [S, 6, C]); only their
last dimension must be contiguous.  x may be the end of a residual branch, in one pass with the norm
that reads it (:func:`residual_norm_modulate`):

    stream = x + [gate_s *] (branch [+ bias])               y of norm(stream), rounded as it is kept

Statistics and arithmetic are float32 (float64 for float64), cast once at the end; mean and rstd
[R, T] are kept for the backward pass, which reads x (or stream) and nothing else of its size.

Traffic in bytes, E = R T C elements of b bytes: forward 2 E b, the three eager operators (norm,
product, sum) 6 E b; backward 3 E b.  With a residual 4 E b forward where one after the other is
5 E b, and 5 E b backward where norm, sum of gradients and gate are 8 E b.  Row gradients (scale,
shift, gain) are computed only when asked for, by a two-stage sum in a fixed order.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import (
    check_activation,
    check_channel_row,
    check_contiguous,
    check_like,
    check_modulation,
    check_sample_rows,
)
from mfd_fast.ops.dispatch import define, differentiable, wanted
from mfd_fast.ops.gated_residual import gradients as residual_gradients

OP = "layer_norm_modulate"


def _fake(x, scale, shift, gain, eps, kind, branch, gate, bias):
    rstd = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    mean = torch.empty_like(rstd) if kind == "layer" else rstd.new_empty(0)
    return torch.empty_like(x), mean, rstd, x.new_empty(0 if branch is None else x.shape)


def _fake_backward(grad, x, scale, gain, mean, rstd, kind, with_sums, base, gate):
    shape = scale.shape if with_sums else (0,)
    has_gain = with_sums and gain is not None
    return (
        torch.empty_like(x),
        scale.new_empty(shape),
        scale.new_empty(shape),
        torch.empty_like(gain) if has_gain else x.new_empty(0),
        x.new_empty(0 if gate is None else x.shape),
    )


def _reference(x, scale, shift, gain, eps, kind, branch, gate, bias):
    stream = x.new_empty(0)
    if branch is not None:
        x = stream = reference.gated_residual(x, branch, gate, bias)
    xhat, mean, rstd = reference.normalise(reference.by_sample(x, scale), eps, kind)
    y = reference.modulate(xhat, scale, shift, gain).reshape(x.shape).to(x.dtype)
    mean = mean.reshape(x.shape[:-1]) if kind == "layer" else rstd.new_empty(0)
    return y, mean, rstd.reshape(x.shape[:-1]), stream


def _reference_backward(grad, x, scale, gain, mean, rstd, kind, with_sums, base, gate):
    grad_z, x_s = reference.by_sample(grad, scale), reference.by_sample(x, scale)
    rstd = rstd.reshape(*x_s.shape[:-1], 1)
    mean = mean.reshape(rstd.shape) if kind == "layer" else 0.0
    grad_xhat = reference.modulate(grad_z, scale, None, gain)
    grad_x = reference.norm_backward(grad_xhat, x_s, mean, rstd, 0.0, kind)
    if base is not None:
        grad_x = grad_x + reference.by_sample(base, scale)
    grad_branch = x.new_empty(0)
    if gate is not None:
        grad_branch = (grad_x * reference.wide(gate).unsqueeze(1)).reshape(x.shape).to(x.dtype)
    grad_x = grad_x.reshape(x.shape).to(x.dtype)
    if not with_sums:
        return grad_x, scale.new_empty(0), scale.new_empty(0), x.new_empty(0), grad_branch
    sum_a, grad_shift = (grad_z * ((x_s - mean) * rstd)).sum(1), grad_z.sum(1)
    grad_scale, grad_gain = sum_a, x.new_empty(0)
    if gain is not None:
        grad_scale = sum_a * reference.wide(gain)
        grad_gain = (sum_a * (1 + reference.wide(scale))).sum(0).to(gain.dtype)
    rows = grad_scale.to(scale.dtype), grad_shift.to(scale.dtype)
    return grad_x, *rows, grad_gain, grad_branch


_forward = define(
    OP,
    "(Tensor x, Tensor scale, Tensor shift, Tensor? gain, float eps, str kind, "
    "Tensor? branch, Tensor? gate, Tensor? bias) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor stream)",
    fake=_fake,
    reference=_reference,
    triton=f"{OP}:{OP}",
)
_gradients = define(
    f"_{OP}_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? gain, Tensor mean, Tensor rstd, str kind, "
    "bool with_sums, Tensor? base, Tensor? gate) -> (Tensor grad_x, Tensor grad_scale, "
    "Tensor grad_shift, Tensor grad_gain, Tensor grad_branch)",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=f"{OP}:{OP}_backward",
)


def _setup_context(ctx, inputs, output):
    x, scale, _, gain, _, ctx.kind, branch, gate, bias = inputs
    _, mean, rstd, stream = output
    ctx.has_residual = branch is not None
    ctx.save_for_backward(
        stream if ctx.has_residual else x,
        branch if ctx.needs_input_grad[7] else None,
        *(gate, bias, scale, gain, mean, rstd),
    )
    ctx.set_materialize_grads(False)  # mean and rstd have none


def _backward(ctx, grad, _mean, _rstd, grad_stream):
    if not ctx.has_residual:  # then stream is empty
        grad_stream = None
    if grad is None and grad_stream is None:
        return (None,) * 9
    x, branch, gate, bias, scale, gain, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad = torch.zeros_like(x) if grad is None else grad.contiguous()
    base = None if grad_stream is None else grad_stream.contiguous()
    has_sums = needs[7] or (needs[8] and gate is not None)
    kept = x, scale, gain, mean, rstd, ctx.kind, any(needs[1:4])
    *grads, grad_branch = _gradients(grad, *kept, base, None if has_sums else gate)
    grad_gate = grad_bias = None
    if has_sums:
        grad_branch, grad_gate, grad_bias = residual_gradients(grads[0], branch, gate, bias, True)
    elif gate is None:
        grad_branch = grads[0]
        grad_bias = grads[0].sum((0, 1)).to(bias.dtype) if needs[8] else None
    needs = *needs[:4], *needs[6:]
    *grads, grad_branch, grad_gate, grad_bias = wanted(
        (*grads, grad_branch, grad_gate, grad_bias), needs
    )
    return *grads, None, None, grad_branch, grad_gate, grad_bias


differentiable(OP, _backward, _setup_context)


def _check(name, x, scale, shift, gain, kind) -> None:
    if kind not in ("layer", "rms"):
        raise ValueError(f"{name}: kind must be 'layer' or 'rms'; got {kind!r}")
    check_activation(name, x, "[R, T, C]")
    check_modulation(name, scale, shift, x)
    if gain is not None:
        check_channel_row(name, "gain", gain, x)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    kind: str = "layer",
) -> Tensor:
    """``norm(x) [* gain] * (1 + scale_s) + shift_s``, like x; gradients to x, scale, shift, gain.

    Args:
        x: ``[R, T, C]``, contiguous, C at most 8192.
        scale, shift: ``[S, C]`` with S a divisor of R, any row stride, of x's dtype or float32.
        eps: added to the variance (or the mean square).
        gain: ``[C]``, of x's dtype or float32, or None for 1.
        kind: "layer" or "rms".

    ``ValueError`` if a shape, dtype, device or stride is another.
    """
    _check(OP, x, scale, shift, gain, kind)
    return _forward(x, scale, shift, gain, eps, kind, None, None, None)[0]


def residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    kind: str = "layer",
) -> tuple[Tensor, Tensor]:
    """The stream ``x + gate_s * (branch + bias)`` and :func:`layer_norm_modulate` of it, both like
    x; gradients to all tensors.

    Args:
        branch: like x.
        gate: like scale, any row stride; None for 1.
        bias: ``[C]``, of x's dtype or float32, or None.

    The others, and ``ValueError``, as for :func:`layer_norm_modulate`.
    """
    name = "residual_norm_modulate"
    _check(name, x, scale, shift, gain, kind)
    check_like(name, "branch", branch, "x", x)
    check_contiguous(name, branch=branch)
    if gate is not None:
        check_sample_rows(name, "gate", gate, x)
        if gate.shape != scale.shape:
            raise ValueError(
                f"{name}: gate must be {list(scale.shape)} like scale; got {list(gate.shape)}"
            )
    if bias is not None:
        check_channel_row(name, "bias", bias, x)
    y, _, _, stream = _forward(x, scale, shift, gain, eps, kind, branch, gate, bias)
    return stream, y
