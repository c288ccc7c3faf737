"""Launchers of ``ops/rms_norm_modulate_silu.py``; the kernels are in ``norm_modulate*.py``."""

import torch
from torch import Tensor

from mfd_fast.kernels.column_sum import finish
from mfd_fast.kernels.norm_modulate import forward
from mfd_fast.kernels.norm_modulate_backward import backward


def rms_norm_modulate_silu(
    x: Tensor, gain: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, rstd).  Inputs are already validated by ``mfd_fast.ops``.

    More than one allocation: the statistics have another shape and dtype than y.
    """
    y, _, rstd, _ = forward(x, scale, shift, gain, eps=eps, kind="l2", silu=True)
    return y, rstd


def rms_norm_modulate_silu_backward(
    grad: Tensor,
    x: Tensor,
    gain: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    rstd: Tensor,
    eps: float,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, gain, scale and shift; the last three empty unless ``with_sums``."""
    grad_x, _, sums = backward(
        grad,
        x,
        scale,
        shift,
        gain,
        rstd,
        rstd,
        kind="l2",
        silu=True,
        with_sums=with_sums,
        eps=eps,
    )
    grad_gain = torch.empty_like(gain) if with_sums else gain.new_empty(0)
    if with_sums and scale is not None:
        grad_scale, grad_shift = scale.new_empty(2, *scale.shape).unbind(0)
    else:
        grad_scale, grad_shift = gain.new_empty(2, 0).unbind(0)
    if sums is not None:
        finish(
            sums,
            first=None if scale is None else grad_scale,
            second=None if scale is None else grad_shift,
            total=grad_gain,
            factor=gain,
            weight=scale,
            offset=1.0,
        )
    return grad_x, grad_gain, grad_scale, grad_shift
