"""Slow, obvious, dtype-generic implementations.  The single source of truth for every operator.

No kernel, no in-place trick, no ``.contiguous()``: a reader checks these against the paper, the
tests run them in float64, and a CPU without the compiled extension runs them in production.
"""

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` -> ``[B, 1, ...]`` so that it broadcasts against ``like`` ``[B, ...]``."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``x_t = (1 - t) x0 + t noise`` and the flow-matching target ``noise - x0``."""
    t = per_sample(t, x0)
    return ((1 - t) * x0 + t * noise).to(x0.dtype), noise - x0


def guide(v: Tensor, num_trajectories: int, guidance: float) -> Tensor:
    """Lanes ``[B, L, ...]`` -> trajectories ``[B, S, ...]``; with L = S + 1 the first is guided."""
    if v.shape[1] == num_trajectories:
        return v
    cond, uncond = v[:, :1], v[:, 1:2]
    return torch.cat([uncond + guidance * (cond - uncond), v[:, 2:]], dim=1)


def ode_step(
    x: Tensor, v: Tensor, history: Tensor | None, coef: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """``(a x + b v + c h, p x + q v)`` with the rows (a, b, c, p, q) of ``coef`` ``[B, 5]``."""
    v = guide(v.to(x.dtype), x.shape[1], guidance)
    a, b, c, p, q = (per_sample(k, x) for k in coef.to(x.dtype).unbind(-1))
    x_next = a * x + b * v
    if history is not None:
        x_next = x_next + c * history
    return x_next, p * x + q * v


def mfd_loss(
    x: Tensor, end_teacher: Tensor, end_aux: Tensor, span: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss ``[]``, distance ``[B]`` and gradient ``[B, ...]``; see ``ops/mfd_loss.py``."""
    diff = (end_aux - end_teacher) / per_sample(span, x)
    distance = diff.flatten(1).norm(dim=1)
    if weight is not None:
        diff = diff * per_sample(weight, x)
    grad = (diff / x.numel()).to(x.dtype)
    return (diff * x).mean(), distance, grad
