"""OccFM's RMS norm, modulation per sample and SiLU on channels-last activations, in one pass.

    z = x / max(|x|_2, eps) * sqrt(C) * gain            |x|_2 over the channels, eps = 1e-12
    z = z * (1 + scale_s) + shift_s                      s = n // (N / S); left out without scale
    y = z * sigmoid(z)

Source: OccFM's network as specified, "RMS norm" and "ResBlock" of section 1.5.  The first half of
a block is modulated by [scale, shift], the two halves (scale first) of a linear of the conditioning
vector; the second half, and both halves of the last block, are not.  eps is a lower bound of the
norm, it is not added to it.

x is [N, ..., C], channels last: [N, H, W, C] with N = samples * frames, or [R, T, C].  scale and
shift are [S, C] with any row stride: the two halves of the linear's [S, 2 C] output as they are.
Arithmetic is float32 (float64 for float64), cast once at the end; sqrt(C) / norm [N, ...] is kept
for the backward pass, which reads x and nothing else of its size.  The gradient of a row grows with
that quotient: where fp16 cannot hold it (a row of zeros) it is inf, and a loss scaler skips the
step.

Traffic in bytes, E = numel(x) elements of b bytes: forward 2 E b, the seven eager operators (norm,
quotient, two products, modulation, SiLU) 13 E b; backward 3 E b.  Row gradients are computed only
when asked for, by a two-stage sum in a fixed order.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import check_activation, check_channel_row, check_modulation
from mfd_fast.ops.dispatch import define, differentiable, wanted

OP = "rms_norm_modulate_silu"


def _fake(x, gain, scale, shift, eps):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=dtype)


def _fake_backward(grad, x, gain, scale, shift, rstd, eps, with_sums):
    row = gain.new_empty(0)
    if with_sums and scale is not None:
        row = scale.new_empty(scale.shape)
    grad_gain = torch.empty_like(gain) if with_sums else gain.new_empty(0)
    return torch.empty_like(x), grad_gain, row, torch.empty_like(row)


def _reference(x, gain, scale, shift, eps):
    xhat, _, rstd = reference.normalise(reference.by_sample(x, scale), eps, "l2")
    z = reference.modulate(xhat, scale, shift, gain)
    return (z * z.sigmoid()).reshape(x.shape).to(x.dtype), rstd.reshape(x.shape[:-1])


def _reference_backward(grad, x, gain, scale, shift, rstd, eps, with_sums):
    grad, x_s = reference.by_sample(grad, scale), reference.by_sample(x, scale)
    rstd = rstd.reshape(*x_s.shape[:-1], 1)
    xhat = x_s * rstd
    z = reference.modulate(xhat, scale, shift, gain)
    sigmoid = z.sigmoid()
    grad_z = grad * sigmoid * (1 + z * (1 - sigmoid))
    grad_xhat = reference.modulate(grad_z, scale, None, gain)
    grad_x = reference.norm_backward(grad_xhat, x_s, rstd, rstd, eps, "l2")
    grad_x = grad_x.reshape(x.shape).to(x.dtype)
    if not with_sums:
        return grad_x, *(gain.new_empty(0) for _ in range(3))
    sum_a = (grad_z * xhat).sum(1)
    if scale is None:
        return grad_x, sum_a.sum(0).to(gain.dtype), gain.new_empty(0), gain.new_empty(0)
    grad_gain = (sum_a * (1 + reference.wide(scale))).sum(0).to(gain.dtype)
    grad_scale = (sum_a * reference.wide(gain)).to(scale.dtype)
    return grad_x, grad_gain, grad_scale, grad_z.sum(1).to(scale.dtype)


_forward = define(
    OP,
    "(Tensor x, Tensor gain, Tensor? scale, Tensor? shift, float eps) -> (Tensor y, Tensor rstd)",
    fake=_fake,
    reference=_reference,
    triton=f"{OP}:{OP}",
)
_gradients = define(
    f"_{OP}_backward",
    "(Tensor grad, Tensor x, Tensor gain, Tensor? scale, Tensor? shift, Tensor rstd, float eps, "
    "bool with_sums) -> (Tensor grad_x, Tensor grad_gain, Tensor grad_scale, Tensor grad_shift)",
    fake=_fake_backward,
    reference=_reference_backward,
    triton=f"{OP}:{OP}_backward",
)


def _setup_context(ctx, inputs, output):
    x, gain, scale, shift, ctx.eps = inputs
    ctx.save_for_backward(x, gain, scale, shift, output[1])
    ctx.set_materialize_grads(False)  # rstd has none


def _backward(ctx, grad, _rstd):
    if grad is None:
        return (None,) * 5
    x, gain, scale, shift, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    kept = x, gain, scale, shift, rstd, ctx.eps
    return *wanted(_gradients(grad.contiguous(), *kept, any(needs[1:4])), needs[:4]), None


differentiable(OP, _backward, _setup_context)


def rms_norm_modulate_silu(
    x: Tensor,
    gain: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-12,
) -> Tensor:
    """SiLU of the modulated RMS norm over the last dimension, like x; gradients to all four.

    Args:
        x: ``[N, ..., C]``, contiguous (a channels_last conv output permuted to N, H, W, C is), C
            at most 8192.
        gain: ``[C]``, of x's dtype or float32.
        scale, shift: ``[S, C]`` with S a divisor of N, any row stride, of x's dtype or float32; or
            both None.
        eps: the least norm a row is divided by, > 0.

    ``ValueError`` if a shape, dtype, device or stride is another.
    """
    check_activation(OP, x, "[N, ..., C]")
    check_channel_row(OP, "gain", gain, x)
    if eps <= 0:
        raise ValueError(f"{OP}: eps must be > 0, the least norm of a row; got {eps}")
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"{OP}: scale and shift must be given together; {missing} is None")
    if scale is not None:
        check_modulation(OP, scale, shift, x)
    return _forward(x, gain, scale, shift, eps)[0]
