"""Optimizers that never wait for the device: tensor learning rate, clipping, non-finite skip."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfd_fast.config import OptimConfig


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    """torch's fused AdamW with the learning rate in a tensor on the parameters' device."""
    if not parameters:
        raise ValueError("there is nothing to train: the role has no parameters")
    return torch.optim.AdamW(
        parameters,
        lr=torch.tensor(config.lr, device=parameters[0].device),
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_warmup_lr(optimizer: Optimizer, config: OptimConfig, update: int) -> None:
    """Linear warm-up: update 0 .. warmup_updates - 1 rise to ``config.lr``; no device sync."""
    if update > config.warmup_updates:
        return
    factor = min(1.0, (update + 1) / max(config.warmup_updates, 1))
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(config.lr * factor)
        else:
            group["lr"] = config.lr * factor


def clip_and_step(optimizer: Optimizer, *, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clip to a global norm and step, unless a gradient is not finite; decided on the device.

    Args:
        clip_norm: largest global L2 norm; 0: no clipping.

    Returns:
        The norm before clipping ``[]`` and 1.0 if the update was skipped else 0.0 ``[]``.
        A fused optimizer skips exactly (``found_inf``: no weight, moment or step count changes);
        any other one sees zero gradients instead, so its moments decay and its weight decay
        applies.
    """
    grads = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm(grads)
    skipped = (~torch.isfinite(norm)).to(torch.float32)
    if clip_norm > 0:
        scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale)
    if _is_fused(optimizer):
        optimizer.found_inf = skipped
        optimizer.step()
        del optimizer.found_inf
    else:
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0).mul_(1.0 - skipped)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def _is_fused(optimizer: Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)
