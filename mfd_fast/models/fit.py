"""Training of a small network from scratch: one loop for every teacher that is trained here."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mfd_fast.files.whole import write_text
from mfd_fast.run.console import BAR
from mfd_fast.settings import Count, CountOrOff, Decay, NotNegative, Positive, Seed, Settings

FINAL_LR = 0.2  # of the largest learning rate, at the end of the cosine
UNDECAYED = ("ln", "norm")  # parts of the names of parameters without weight decay


@dataclass(frozen=True, kw_only=True)
class FitConfig(Settings):
    """The optimization of one network."""

    updates: Count = 1000
    """Updates in all."""
    batch_size: Count = 8
    """Samples of an update."""
    lr: Positive = 1e-3
    """Learning rate after the warm-up."""
    warmup_updates: CountOrOff = 100
    """Updates over which the learning rate rises linearly."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    ema_decay: Decay = 0.0
    """Decay of the EMA weights, which are kept in place of the weights; 0: none."""
    seed: Seed = 0
    """Seeds initial weights, batches, noise."""


def lr_factor(config: FitConfig, n: int) -> float:
    """Linear warm-up, then a cosine from 1 to ``FINAL_LR``."""
    if n < config.warmup_updates:
        return (n + 1) / config.warmup_updates
    progress = (n - config.warmup_updates) / max(1, config.updates - config.warmup_updates)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    network: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: FitConfig,
    *,
    factor: Callable[[Any, int], float] = lr_factor,
    betas: tuple[float, float] = (0.9, 0.999),
    clip_norm: float = 5.0,
    undecayed: tuple[str, ...] = UNDECAYED,
    loss_window: int = 50,
) -> tuple[nn.Module, dict[str, Any]]:
    """Minimise ``loss_of(n)``, n the number of the update, by AdamW.

    Args:
        factor: (config, n) -> learning rate of update n over ``config.lr``.
        clip_norm: of all gradients together; 0: they are not clipped.
        undecayed: parts of the names of parameters without weight decay.
        loss_window: updates behind one number of the loss history.

    Returns:
        The network, or its EMA weights, in eval mode; and what the run's file says.
    """
    average = None
    if config.ema_decay:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    groups = _groups(network, config.weight_decay, undecayed)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: factor(config, n))
    losses = torch.zeros(config.updates)
    start = time.perf_counter()
    from tqdm import tqdm  # here: who only loads a network needs none

    name = f"{type(network).__name__} "
    bar = tqdm(range(config.updates), name, bar_format=BAR, dynamic_ncols=True)
    for n in bar:
        loss = loss_of(n)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        schedule.step()
        if average:
            average.update_parameters(network)
        losses[n] = loss.detach()
        if n % loss_window == loss_window - 1:
            bar.set_postfix(loss=f"{losses[n + 1 - loss_window : n + 1].mean():.4f}")
    return (average.module if average else network).eval(), {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "loss_window": loss_window,
        "losses": [window.mean().item() for window in losses.split(loss_window)],
    }


def _groups(
    network: nn.Module, weight_decay: float, undecayed: tuple[str, ...]
) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {weight_decay: []}
    for name, parameter in network.named_parameters():
        is_other = any(part in name.lower() for part in undecayed)
        groups.setdefault(0.0 if is_other else weight_decay, []).append(parameter)
    return [{"params": params, "weight_decay": w} for w, params in groups.items() if params]


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` makes from this seed; the caller's random numbers go on as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def make_folder(out: Path, *names: str) -> None:
    """Make the folder now, not after hours of training; ``FileExistsError`` if it holds a name."""
    if existing := [name for name in names if (out / name).exists()]:
        raise FileExistsError(
            f"{out} already holds {', '.join(existing)}; choose another folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)


def write_metrics(path: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write them as JSON, and give them back."""
    write_text(path, json.dumps(metrics, indent=1) + "\n")
    return metrics
