"""Launchers of ``ops/layer_norm_modulate.py``; the kernels are in ``norm_modulate*.py``."""

import torch
from torch import Tensor

from mfd_fast.kernels.column_sum import finish
from mfd_fast.kernels.norm_modulate import forward
from mfd_fast.kernels.norm_modulate_backward import backward


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, gain: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd).  Inputs are already validated by ``mfd_fast.ops``.

    More than one allocation: the statistics have another shape and dtype than y.
    """
    return forward(x, scale, shift, gain, eps=eps, kind=kind, silu=False)


def layer_norm_modulate_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, scale, shift and gain; the last three empty unless ``with_sums``."""
    grad_x, sums = backward(
        grad, x, scale, None, gain, mean, rstd, kind=kind, silu=False, with_sums=with_sums
    )
    grad_gain = x.new_empty(0) if gain is None or sums is None else torch.empty_like(gain)
    if sums is None:
        return grad_x, scale.new_empty(0), scale.new_empty(0), grad_gain
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
    return grad_x, grad_scale, grad_shift, grad_gain
