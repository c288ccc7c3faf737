"""LayerNorm (or RMS norm with gain) and modulation per sample, in one pass.

    y = norm(x) [* gain] * (1 + scale_s) + shift_s          s = r // (R / S)

    kind "layer"  norm(x) = (x - mean) / sqrt(var + eps) over the channels, population variance
    kind "rms"    norm(x) = x / sqrt(mean(x^2) + eps)

x is [R, T, C] (R lanes of T tokens, C channels), scale and shift are [S, C]: S samples, R / S lanes
of each, one after the other.  They may be rows of a larger tensor (SANA: of [S, 6, C]); only their
last dimension must be contiguous.  Statistics and arithmetic are float32 (float64 for float64),
cast once at the end; mean and rstd [R, T] are kept for the backward pass, which reads x and nothing
else of its size.

Traffic in bytes, E = R T C elements of b bytes: forward 2 E b, the three eager operators (norm,
product, sum) 6 E b; backward 3 E b.  Row gradients (scale, shift, gain) are computed only when
asked for, by a two-stage sum in a fixed order.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import check_activation, check_channel_row, check_modulation
from mfd_fast.ops.dispatch import define, differentiable, wanted

OP = "layer_norm_modulate"


def _fake(x, scale, shift, gain, eps, kind):
    rstd = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    mean = torch.empty_like(rstd) if kind == "layer" else rstd.new_empty(0)
    return torch.empty_like(x), mean, rstd


def _fake_backward(grad, x, scale, gain, mean, rstd, kind, with_sums):
    shape = scale.shape if with_sums else (0,)
    has_gain = with_sums and gain is not None
    return (
        torch.empty_like(x),
        scale.new_empty(shape),
        scale.new_empty(shape),
        torch.empty_like(gain) if has_gain else x.new_empty(0),
    )


def _reference(x, scale, shift, gain, eps, kind):
    xhat, mean, rstd = reference.normalise(reference.by_sample(x, scale), eps, kind)
    y = reference.modulate(xhat, scale, shift, gain).reshape(x.shape).to(x.dtype)
    mean = mean.reshape(x.shape[:-1]) if kind == "layer" else rstd.new_empty(0)
    return y, mean, rstd.reshape(x.shape[:-1])


def _reference_backward(grad, x, scale, gain, mean, rstd, kind, with_sums):
    grad_z, x_s = reference.by_sample(grad, scale), reference.by_sample(x, scale)
    rstd = rstd.reshape(*x_s.shape[:-1], 1)
    mean = mean.reshape(rstd.shape) if kind == "layer" else 0.0
    grad_xhat = reference.modulate(grad_z, scale, None, gain)
    grad_x = reference.norm_backward(grad_xhat, x_s, mean, rstd, 0.0, kind)
    grad_x = grad_x.reshape(x.shape).to(x.dtype)
    if not with_sums:
        return grad_x, scale.new_empty(0), scale.new_empty(0), x.new_empty(0)
    sum_a, grad_shift = (grad_z * ((x_s - mean) * rstd)).sum(1), grad_z.sum(1)
    grad_scale, grad_gain = sum_a, x.new_empty(0)
    if gain is not None:
        grad_scale = sum_a * reference.wide(gain)
        grad_gain = (sum_a * (1 + reference.wide(scale))).sum(0).to(gain.dtype)
    return grad_x, grad_scale.to(scale.dtype), grad_shift.to(scale.dtype), grad_gain


_forward = define(
    OP,
    "(Tensor x, Tensor scale, Tensor shift, Tensor? gain, float eps, str kind) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fake,
    reference=_reference,
    triton=f"{OP}:{OP}",
)
_gradients = define(
    f"_{OP}_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? gain, Tensor mean, Tensor rstd, str kind, "
    "bool with_sums) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_gain)",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=f"{OP}:{OP}_backward",
)


def _setup_context(ctx, inputs, output):
    x, scale, _, gain, _, ctx.kind = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, gain, mean, rstd)
    ctx.set_materialize_grads(False)  # mean and rstd have none


def _backward(ctx, grad, _mean, _rstd):
    if grad is None:
        return (None,) * 6
    x, scale, gain, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    kept = x, scale, gain, mean, rstd, ctx.kind
    return *wanted(_gradients(grad.contiguous(), *kept, any(needs[1:4])), needs[:4]), None, None


differentiable(OP, _backward, _setup_context)


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
    if kind not in ("layer", "rms"):
        raise ValueError(f"{OP}: kind must be 'layer' or 'rms'; got {kind!r}")
    check_activation(OP, x, "[R, T, C]")
    check_modulation(OP, scale, shift, x)
    if gain is not None:
        check_channel_row(OP, "gain", gain, x)
    return _forward(x, scale, shift, gain, eps, kind)[0]
