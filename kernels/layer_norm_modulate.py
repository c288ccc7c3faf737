"""Launchers of ``ops/layer_norm_modulate.py``; the kernels are in ``norm_modulate*.py``."""

import torch
from torch import Tensor

from mfd_fast.kernels.column_sum import finish
from mfd_fast.kernels.norm_modulate import Residual, forward
from mfd_fast.kernels.norm_modulate_backward import backward


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    gain: Tensor | None,
    eps: float,
    kind: str,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, stream).  Inputs are already validated by ``mfd_fast.ops``.

    More than one allocation: the statistics have another shape and dtype than y, and the stream is
    a result beside it.
    """
    residual = Residual(branch, gate, bias)
    return forward(x, scale, shift, gain, residual, eps=eps, kind=kind, silu=False)


def layer_norm_modulate_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
    with_sums: bool,
    base: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, scale, shift, gain (these three empty unless ``with_sums``) and branch (empty
    without ``gate``).

    More than one allocation: with ``gate``, for the branch.
    """
    grad_x, grad_branch, sums = backward(
        grad, x, scale, None, gain, mean, rstd, base, gate,
        kind=kind, silu=False, with_sums=with_sums,
    )  # fmt: skip
    grad_gain = x.new_empty(0) if gain is None or sums is None else torch.empty_like(gain)
    if sums is None:
        return grad_x, scale.new_empty(0), scale.new_empty(0), grad_gain, grad_branch
    grad_scale, grad_shift = scale.new_empty(2, *scale.shape).unbind(0)
    finish(
        sums,
        first=grad_scale,
        second=grad_shift,
        total=None if gain is None else grad_gain,
        factor=gain,
        weight=scale,
        offset=1.0,
    )
    return grad_x, grad_scale, grad_shift, grad_gain, grad_branch
