"""The student's surrogate loss from two end states: value, distance and gradient in one pass.

    u_T - u_A = (end_aux - end_teacher) / span            both trajectories start at the same x_t
    loss      = mean over all elements of weight * stopgrad(u_T - u_A) * x
    distance  = | u_T - u_A |_2 per sample                 (paper D.6)
    grad      = weight * (u_T - u_A) / numel               the gradient of the loss to x

With x = x_t and no weight this is the loss of the method; with x = x_0 and weight = 1 - t the
gradient arrives at the clean sample directly.  x ``[B, ...]``; the ends may be planes of
one ``[B, 2, ...]`` state buffer.  Traffic: 3 reads and 1 write per element; the seven eager
operators move 17.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import check_like, check_rows
from mfd_fast.ops.dispatch import define, differentiable

OP = "mfd_loss"


def _fake(x, end_teacher, end_aux, span, weight):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((), dtype=dtype), x.new_empty(x.shape[:1], dtype=dtype), torch.empty_like(x)


def _reference(x, end_teacher, end_aux, span, weight):
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:  # a mean over nothing would be NaN
        return x.new_zeros((), dtype=wide), x.new_zeros(x.shape[:1], dtype=wide), x.clone()
    ends = (end_teacher.to(wide), end_aux.to(wide))
    loss, distance, grad = reference.mfd_loss(x.to(wide), *ends, span, weight)
    return loss, distance, grad.to(x.dtype)


_loss = define(
    OP,
    "(Tensor x, Tensor end_teacher, Tensor end_aux, Tensor span, Tensor? weight) "
    "-> (Tensor loss, Tensor distance, Tensor grad)",
    fake=_fake,
    reference=_reference,
    triton=f"{OP}:{OP}",
    is_compiled=True,
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2])


def _backward(ctx, grad_loss, _distance, _grad):
    (grad,) = ctx.saved_tensors
    return (grad * grad_loss).to(grad.dtype), None, None, None, None  # the ends are stop-gradient


differentiable(OP, _backward, _setup_context)


def mfd_loss_from_ends(
    x: Tensor, end_teacher: Tensor, end_aux: Tensor, span: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, distance and gradient from the end states of the two trajectories (Eq. 15-20).

    Args:
        x: what the gradient is for, ``[B, ...]``: x_t, or x_0 with ``weight = 1 - t``.
        end_teacher, end_aux: states at r of the guided teacher's and the auxiliary's ODE started at
            the same x_t, like x; each sample contiguous, any batch stride.
        span: t - r, ``[B]`` float32 (or float64 with float64 x), > 0; 1 for a sample with t == r,
            see ``solvers.plan``.
        weight: per-sample factor, like span, or None.

    Returns:
        loss ``[]`` and distance ``[B]`` (float32, or float64 with float64 x; differentiate the
        loss), gradient like x.
    """
    if x.ndim == 0:
        raise ValueError("mfd_loss: x must be [B, ...]; got a scalar")
    check_like(OP, "end_teacher", end_teacher, "x", x)
    check_like(OP, "end_aux", end_aux, "x", x)
    span = check_rows(OP, span, "span", x)
    weight = None if weight is None else check_rows(OP, weight, "weight", x)
    end_teacher, end_aux = (_rows_contiguous(end) for end in (end_teacher, end_aux))
    return _loss(x.contiguous(), end_teacher, end_aux, span, weight)


def _rows_contiguous(x: Tensor) -> Tensor:
    """x itself if every sample is contiguous (the kernels take a batch stride), else a copy."""
    return x if x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()


def mfd_loss(x_t: Tensor, u_teacher: Tensor, u_aux: Tensor) -> Tensor:
    """Mean Flow Distillation loss ``mean(stopgrad(u_teacher - u_aux) * x_t)``, ``[]``.

    Args:
        x_t: noised student samples, ``[B, ...]``; ``d loss / d x_t = (u_teacher - u_aux) / numel``.
        u_teacher, u_aux: mean velocities over [r, t] of the guided teacher and of the auxiliary,
            like x_t; no gradient flows to them.

    Source: Eq. 20.  ``ValueError`` if shapes, dtypes or devices disagree.
    """
    one = torch.ones(x_t.shape[:1], dtype=torch.float32, device=x_t.device)
    # (end_aux - end_teacher) / span with span = 1 and the velocities in these places is u_T - u_A.
    return mfd_loss_from_ends(x_t, u_aux.detach(), u_teacher.detach(), one)[0]
