"""Training of OccFM's VAE and of its flow-matching teacher, by the published recipe.

    mfd-fast pretrain occfm-vae --store STORE      class ids -> vae.safetensors
    mfd-fast prepare occfm --data DIR --out STORE2 --vae vae.safetensors
    mfd-fast pretrain occfm --store STORE2         latents -> teacher.safetensors

AdamW without decay of gains, a linear warm-up, a cosine to a fifth of the learning rate, gradients
clipped to norm 5; the teacher is the running average of its weights.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from mfd_fast.files.whole import write_text
from mfd_fast.flow.solvers import to_device
from mfd_fast.flow.times import sample_times
from mfd_fast.models.occfm import CONFIGS, OccfmNetwork
from mfd_fast.models.occfm.data.classes import HISTORY
from mfd_fast.models.occfm.data.files import write_latents
from mfd_fast.models.occfm.data.store import OccupancyStore
from mfd_fast.models.occfm.data.windows import OccupancyBatch, OccupancyClips, OccupancyWindows
from mfd_fast.models.occfm.loading import save_occfm_transition, save_occfm_vae
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS
from mfd_fast.models.occfm.vae.loss import vae_loss
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.ops import interpolate_with_target
from mfd_fast.run.device import pick_device
from mfd_fast.settings import Count, CountOrOff, Decay, NotNegative, Positive, Seed, Settings

VAE, TEACHER = "vae.safetensors", "teacher.safetensors"
LOSS_WINDOW = 50  # updates behind one number of the loss history
FINAL_LR = 0.2  # of the largest learning rate, at the end of the cosine
CLIP_NORM = 5.0
UNDECAYED = ("ln", "norm")  # parts of the names of parameters without weight decay


@dataclass(frozen=True, kw_only=True)
class FitConfig(Settings):
    """The optimization of one network."""

    updates: Count = 1000
    """Updates in all."""
    batch_size: Count = 8
    """Frames or windows of an update."""
    lr: Positive = 1e-3
    """Learning rate after the warm-up."""
    warmup_updates: CountOrOff = 100
    """Updates over which the learning rate rises linearly; the published runs take 1,000."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; none for gains and adaptive norms."""
    ema_decay: Decay = 0.0
    """Decay of the running average that is kept in place of the weights; 0: no average."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes cuda if there is one."""
    seed: Seed = 0
    """Seeds initial weights, batches, noise."""


@dataclass(frozen=True, kw_only=True)
class VaePretrain(FitConfig):
    """Training of a VAE of single frames."""

    store: str = ""
    """Store with labels, from mfd-fast prepare occfm."""
    model: Literal["tiny", "occfm_vae", "occfm_vae_4c", "occfm_vae_8c", "occfm_vae_64c"] = "tiny"
    """Sizes of the network."""


@dataclass(frozen=True, kw_only=True)
class TeacherPretrain(FitConfig):
    """Training of a transition network by flow matching."""

    store: str = ""
    """Store with latents, from mfd-fast prepare occfm."""
    model: Literal["tiny", "occfm", "occfm_fut", "occfm_4c", "occfm_8c", "occfm_64c"] = "tiny"
    """Sizes of the network."""
    ema_decay: Decay = 0.99
    """Decay of the running average that is kept; the published runs take 0.9999."""
    history_dropout: Decay = 0.2
    """Share of windows whose history is hidden, which guidance needs."""


def pretrain_vae(config: VaePretrain, out: Path) -> dict[str, Any]:
    """Train a VAE on single frames; writes ``vae.safetensors`` and ``vae_metrics.json``."""
    _refuse_existing(out, VAE, "vae_metrics.json")
    device = pick_device(config.device)
    clips = OccupancyClips(OccupancyStore(Path(config.store) / "training"))
    generator = Generator(device).manual_seed(config.seed)
    vae = _seeded(config.seed, lambda: OccupancyVae(VAE_CONFIGS[config.model])).to(device)

    def loss(n: int) -> Tensor:
        ids = clips.batch(n, config.batch_size, config.seed)[:, 0].to(device)
        return vae_loss(vae, ids.long(), generator=generator).total

    trained, metrics = fit(vae, loss, config)
    save_occfm_vae(trained, out / VAE, metadata=metrics)
    return _write_metrics(out / "vae_metrics.json", metrics)


def cache_latents(data: Path, split: str, vae: OccupancyVae, *, size: str = "x16") -> Path:
    """Write the latents of every key frame of a split, one draw each, as published ones are."""
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def encode(grid: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(grid)[None].to(device)
        return vae.encode(ids, generator=generator)[0].cpu().numpy()

    return write_latents(data, split, encode, size=size)


def pretrain_teacher(config: TeacherPretrain, out: Path) -> dict[str, Any]:
    """Train a teacher; writes ``teacher.safetensors`` and ``teacher_metrics.json``.

    The scale of the latents is one over their standard deviation in the store, which for the
    published latents is about the published 10.
    """
    _refuse_existing(out, TEACHER, "teacher_metrics.json")
    device = pick_device(config.device)
    store = OccupancyStore(Path(config.store) / "training")
    sizes = CONFIGS[config.model]
    if config.model == "tiny":
        sizes = replace(sizes, latent_scale=_latent_scale(store))
    windows = OccupancyWindows(store, history=sizes.history_last)
    generator = Generator(device).manual_seed(config.seed)
    teacher = _seeded(config.seed, lambda: OccfmNetwork(sizes)).to(device)

    def loss(n: int) -> Tensor:
        batch = windows.batch(n, config.batch_size, config.seed)
        batch = OccupancyBatch(*(to_device(leaf, device) for leaf in batch))
        return flow_matching_loss(teacher, batch, config.history_dropout, generator)

    trained, metrics = fit(teacher, loss, config)
    save_occfm_transition(trained, out / TEACHER, metadata=metrics)
    return _write_metrics(out / "teacher_metrics.json", metrics)


def flow_matching_loss(
    network: OccfmNetwork, batch: OccupancyBatch, history_dropout: float, generator: Generator
) -> Tensor:
    """Mean squared error of the velocity of the future frames, at logit-normal times.

    The history of a share of the windows is hidden; the trajectory never is.
    """
    history, future = batch.latents.split(HISTORY, dim=1)
    rows, device = len(history), history.device
    is_kept = torch.rand(rows, generator=generator, device=device) >= history_dropout
    cond = {
        "history": history * is_kept[:, None, None, None, None],
        "trajectory": batch.trajectory,
    }
    noise = torch.randn(future.shape, generator=generator, device=device)
    t = sample_times(rows, generator=generator)
    x_t, target = interpolate_with_target(future * network.config.latent_scale, noise, t)
    return F.mse_loss(network(x_t, t, cond), target)


def fit(
    network: nn.Module, loss_of: Callable[[int], Tensor], config: FitConfig
) -> tuple[nn.Module, dict[str, Any]]:
    """Minimise ``loss_of(n)``, n the number of the update.

    Returns:
        The network, or the average of its weights, in eval mode; and what the run's file says.
    """
    average = None
    if config.ema_decay:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = torch.optim.AdamW(_groups(network, config.weight_decay), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: lr_factor(config, n))
    losses = torch.zeros(config.updates)
    start = time.perf_counter()
    for n in (bar := tqdm(range(config.updates), desc=type(network).__name__, unit="update")):
        loss = loss_of(n)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        if average:
            average.update_parameters(network)
        losses[n] = loss.detach()
        if n % LOSS_WINDOW == LOSS_WINDOW - 1:
            bar.set_postfix(loss=f"{losses[n + 1 - LOSS_WINDOW : n + 1].mean():.4f}")
    return (average.module if average else network).eval(), {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "loss_window": LOSS_WINDOW,
        "losses": [window.mean().item() for window in losses.split(LOSS_WINDOW)],
    }


def lr_factor(config: FitConfig, n: int) -> float:
    """Linear warm-up, then a cosine from 1 to ``FINAL_LR``."""
    if n < config.warmup_updates:
        return (n + 1) / config.warmup_updates
    progress = (n - config.warmup_updates) / max(1, config.updates - config.warmup_updates)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed, others = [], []
    for name, parameter in network.named_parameters():
        is_other = any(part in name.lower() for part in UNDECAYED)
        (others if is_other else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _latent_scale(store: OccupancyStore) -> float:
    latents = store.array("latents")
    every = max(1, len(latents) // 1000)
    return float(1 / latents[::every].std())


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _refuse_existing(out: Path, *names: str) -> None:
    if existing := [name for name in names if (out / name).exists()]:
        raise FileExistsError(f"{out} already holds {existing}; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)  # now: not after minutes of training


def _write_metrics(path: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    write_text(path, json.dumps(metrics, indent=1) + "\n")
    return metrics
