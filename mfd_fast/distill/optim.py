"""Optimizers that never wait for the device: tensor learning rate, clipping, non-finite skip."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfd_fast.distill.config import OptimConfig
from mfd_fast.distill.ranks import is_sharded, local


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    """The optimizer named by ``config.kind``, learning rate in a tensor where it can be captured.

    ``adamw`` is torch's fused one; ``adamw8bit`` bitsandbytes', ``adamw8bit_torchao`` torchao's,
    ``fused_adam`` apex's.  ``ImportError`` says what to install; ``ValueError`` if there is nothing
    to train.
    """
    if not parameters:
        raise ValueError("there is nothing to train: the role has no parameters")
    return OPTIMIZERS[config.kind](parameters, config)


def _adamw(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    device = parameters[0].device
    return torch.optim.AdamW(
        parameters,
        lr=torch.tensor(config.lr, device=device),
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )


def _other(module: str, name: str, package: str, **extra) -> Callable:
    """An optimizer of another package; imported only when it is asked for."""

    def make(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
        try:
            cls = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ImportError(
                f"kind {config.kind} needs {package}, which does not import here ({error}): "
                f"pip install {package}, or take kind adamw"
            ) from None
        return cls(
            parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            **extra,
        )

    return make


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], OptimConfig], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _other("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "adamw8bit_torchao": _other("torchao.optim", "AdamW8bit", "torchao"),
    "fused_adam": _other("apex.optimizers", "FusedAdam", "NVIDIA apex", adam_w_mode=True),
}


def check_own(
    optimizers: dict[str, Optimizer],
    configs: dict[str, OptimConfig],
    trained: dict[str, list[nn.Parameter]],
) -> None:
    """For optimizers that a user passes; ``ValueError`` unless there is one for each role, over
    nothing but what training the role changes, and no setting that they would have to follow.
    """
    if set(optimizers) != set(configs):
        raise ValueError(
            f"optimizers must have the keys {' and '.join(configs)}; got {sorted(optimizers)}"
        )
    for role, config in configs.items():
        known = {id(parameter) for parameter in trained[role]}
        groups = getattr(optimizers[role], "param_groups", ())
        if any(id(parameter) not in known for group in groups for parameter in group["params"]):
            raise ValueError(
                f"optimizers[{role!r}] has parameters that training does not change: make it with "
                f"backbone.parameters_of({role!r})"
            )
        if config.warmup_updates:
            raise ValueError(
                f"distill.{role}_optim.warmup_updates={config.warmup_updates} belongs to the "
                "optimizers made from the config, and yours were passed: set it to 0 and give "
                "yours a torch.optim.lr_scheduler"
            )


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state, inside the wrappers of accelerate and Lightning: a step
    goes through those, which count it; everything else must not stop at them.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_capturable(optimizer: Optimizer) -> bool:
    """Whether a step may run inside a CUDA graph: it says so, with its learning rate in a tensor
    on the parameters' device, and no wrapper counts its steps.
    """
    return unwrapped(optimizer) is optimizer and all(
        isinstance(group["lr"], Tensor)
        and all(p.device == group["lr"].device for p in group["params"])
        and bool(group.get("capturable") or group["lr"].device.type == "cpu")
        for group in optimizer.param_groups
    )


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``, which would put the state's own tensor in place of a learning
    rate on the device: the old tensor stays and takes its value.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))


def set_warmup_lr(optimizer: Optimizer, config: OptimConfig, update: int) -> None:
    """Linear warm-up: update 0 .. warmup_updates - 1 rise to ``config.lr``; no device sync."""
    if update > config.warmup_updates:
        return
    set_lr(optimizer, config.lr * min(1.0, (update + 1) / max(config.warmup_updates, 1)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The learning rate of every group, in its tensor if it has one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class LossScale:
    """The loss scale of fp16 training, on the device: halved by a non-finite step, slowly doubled.

    The update rule is ``torch.amp.GradScaler``'s (growth 2 after 2,000 finite steps, backoff 0.5).
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, initial: float, device: torch.device):
        self.scale = torch.full((), initial, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: Tensor) -> None:
        """Follow one step; skipped is 1.0 if a gradient was not finite, ``[]``."""
        torch._amp_update_scale_(
            self.scale, self.finite_steps, skipped, self.GROWTH, self.BACKOFF, self.INTERVAL
        )


def clip_and_step(
    optimizer: Optimizer, *, clip_norm: float, loss_scale: LossScale | None = None
) -> tuple[Tensor, Tensor]:
    """Unscale, clip to a global norm and step, unless a gradient is not finite; on the device.

    Args:
        clip_norm: largest global L2 norm; 0: no clipping.
        loss_scale: what the loss was multiplied by; updated.

    Returns:
        The norm before clipping ``[]`` and 1.0 if the update was skipped else 0.0 ``[]``.
        No weight changes in a skipped update.  A fused optimizer (``found_inf``) keeps its moments
        and step count too; in any other one they see a gradient of zero.

    Gradients are zeroed in place afterwards: their addresses stay.
    """
    inner = unwrapped(optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if is_sharded(norm):  # of all ranks together
        norm, grads = norm.full_tensor(), local(grads)
    skipped = (~torch.isfinite(norm)).to(torch.float32)
    factor = None
    if loss_scale is not None:
        factor = 1.0 / loss_scale.scale
        norm = norm * factor
        loss_scale.update(skipped)
    if clip_norm > 0:
        clip = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else factor * clip
    if factor is not None:
        torch._foreach_mul_(grads, factor)
    if all(group.get("fused") for group in inner.param_groups):
        inner.found_inf = skipped
        optimizer.step()
        del inner.found_inf
    else:
        weights = local([p.detach() for p in parameters])
        before = [weight.clone() for weight in weights]
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0).mul_(1.0 - skipped)
        optimizer.step()
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(torch.where(skipped > 0, old, weight))
    torch._foreach_zero_(grads)
    return norm, skipped


def average_(
    averages: list[Tensor], values: list[Tensor], *, decay: float, skipped: Tensor
) -> None:
    """averages <- decay averages + (1 - decay) values, in place; nothing moves where ``skipped``
    ``[]`` is 1.0, which the host never sees.
    """
    for average, value in zip(local(averages), local(values), strict=True):
        average.lerp_(value, (1.0 - skipped).to(average.dtype) * (1.0 - decay))
