"""One solver step for every trajectory of every sample, guidance and the next model input included.

    v_0 = v_uncond + w (v_cond - v_uncond)          if trajectory 0 is guided (L = S + 1 lanes)
    x   <- a x + b v + c h                           rows (a, b, c, p, q) of coef, one per sample
    h   <- p x + q v                                 (with the old x; what the solver remembers)
    x_in <- x in the model's dtype, on every lane of its trajectory

x, h are ``[B, S, ...]`` float32, v and x_in ``[B, L, ...]`` in the model's dtype, coef ``[B, 5]``.
Guided teacher and auxiliary: S = 2, L = 3, lanes (conditional, unconditional, auxiliary).  Traffic
per sample and element at S = 2, L = 3 with bf16 lanes and no history: 4S + 4S + 2L + 2L = 28 bytes;
the eight eager operators move 70.
"""

import torch
from torch import Tensor

from mfd_fast.ops import reference
from mfd_fast.ops.checks import check_contiguous, check_rows
from mfd_fast.ops.dispatch import define

OP = "ode_step_"


def _reference(x, v, history, coef, guidance, x_in):
    x_next, h_next = reference.ode_step(x, v, history, coef, guidance)
    x.copy_(x_next)
    if history is not None:
        history.copy_(h_next)
    if x_in is not None:
        is_guided = x_in.shape[1] > x.shape[1]
        x_in.copy_(torch.cat([x[:, :1], x], dim=1) if is_guided else x)


_step = define(
    OP,
    "(Tensor(a!) x, Tensor v, Tensor(b!)? history, Tensor coef, float guidance, Tensor(c!)? x_in)"
    " -> ()",
    fake=lambda x, v, history, coef, guidance, x_in: None,
    reference=_reference,
    triton=f"ode_step:{OP}",
    is_compiled=True,
)


def _check(x, v, history, x_in) -> None:
    lanes = {x.shape[1], x.shape[1] + 1} if x.ndim >= 2 else set()
    if (
        v.ndim != x.ndim
        or v.shape[0] != x.shape[0]
        or v.shape[2:] != x.shape[2:]
        or (v.shape[1] not in lanes)
    ):
        raise ValueError(
            f"ode_step_: v must be [B, S or S + 1, ...] for x [B, S, ...] = {list(x.shape)}; "
            f"got {list(v.shape)}"
        )
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    if x.dtype != wide:
        raise ValueError(f"ode_step_: x must be {wide} for v of {v.dtype}; got {x.dtype}")
    for name, tensor, like in (("history", history, x), ("x_in", x_in, v)):
        if tensor is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype):
            raise ValueError(
                f"ode_step_: {name} must be {like.dtype} {list(like.shape)}; "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, tensor in (("x", x), ("v", v), ("history", history), ("x_in", x_in)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"ode_step_: {name} must be on {x.device}; got {tensor.device}")
    check_contiguous(OP, x=x, v=v, history=history, x_in=x_in)


def ode_step_(
    x: Tensor,
    v: Tensor,
    history: Tensor | None,
    coef: Tensor,
    *,
    guidance: float = 1.0,
    x_in: Tensor | None = None,
) -> None:
    """Advance ``x`` (and ``history``, and the model inputs ``x_in``) in place by one solver step.

    Args:
        x: states, ``[B, S, ...]`` float32 (float64 with float64 v), contiguous; overwritten.
        v: velocities of the lanes, ``[B, L, ...]``, contiguous; L = S, or S + 1 with lane 0 the
            conditional and lane 1 the unconditional velocity of trajectory 0.
        history: what a multistep solver remembers, like x; overwritten.  None for Euler.
        coef: rows (a, b, c, p, q) of ``solvers.SolverTable``, ``[B, 5]`` float32, or float64 with
            float64 x.
        guidance: classifier-free guidance scale w; used only when L = S + 1.
        x_in: next model inputs, like v; overwritten.  None if the model reads ``x`` itself.

    No gradient flows: teacher and auxiliary are integrated under stop-gradient (method, Eq. 15-20).
    ``ValueError`` if shapes, dtypes or devices disagree or a tensor is not contiguous.
    """
    _check(x, v, history, x_in)
    coef = check_rows("ode_step_", coef, "coef", x, 5)
    _step(x, v, history, coef, guidance, x_in)
