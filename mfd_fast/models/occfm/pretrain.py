"""Training of OccFM's VAE and of its flow-matching teacher, by the published recipe.

    mfd-fast pretrain occfm-vae --store STORE      class ids -> vae.safetensors
    mfd-fast prepare occfm --data DIR --out STORE2 --vae vae.safetensors
    mfd-fast pretrain occfm --store STORE2         latents -> teacher.safetensors

AdamW without decay of gains, a linear warm-up, a cosine to a fifth of the learning rate, gradients
clipped to norm 5; the teacher is the running average of its weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mfd_fast.flow.solvers import to_device
from mfd_fast.flow.times import sample_times
from mfd_fast.models.fit import FitConfig, fit, make_folder, seeded, write_metrics
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
from mfd_fast.settings import Decay

VAE, TEACHER = "vae.safetensors", "teacher.safetensors"


@dataclass(frozen=True, kw_only=True)
class OccfmPretrain(FitConfig):
    """Training of either network; the published runs warm up over 1,000 updates."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class VaePretrain(OccfmPretrain):
    """Training of a VAE of single frames."""

    store: str = ""
    """Store with labels, from mfd-fast prepare occfm."""
    model: Literal["tiny", "occfm_vae", "occfm_vae_4c", "occfm_vae_8c", "occfm_vae_64c"] = "tiny"
    """Sizes of the network."""


@dataclass(frozen=True, kw_only=True)
class TeacherPretrain(OccfmPretrain):
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
    make_folder(out, VAE, "vae_metrics.json")
    device = pick_device(config.device)
    clips = OccupancyClips(OccupancyStore(Path(config.store) / "training"))
    generator = Generator(device).manual_seed(config.seed)
    vae = seeded(config.seed, lambda: OccupancyVae(VAE_CONFIGS[config.model])).to(device)

    def loss(n: int) -> Tensor:
        ids = clips.batch(n, config.batch_size, config.seed)[:, 0].to(device)
        return vae_loss(vae, ids.long(), generator=generator).total

    trained, metrics = fit(vae, loss, config)
    save_occfm_vae(trained, out / VAE, metadata=metrics)
    return write_metrics(out / "vae_metrics.json", metrics)


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
    make_folder(out, TEACHER, "teacher_metrics.json")
    device = pick_device(config.device)
    store = OccupancyStore(Path(config.store) / "training")
    sizes = CONFIGS[config.model]
    if config.model == "tiny":
        sizes = replace(sizes, latent_scale=_latent_scale(store))
    windows = OccupancyWindows(store, history=sizes.history_last)
    generator = Generator(device).manual_seed(config.seed)
    teacher = seeded(config.seed, lambda: OccfmNetwork(sizes)).to(device)

    def loss(n: int) -> Tensor:
        batch = windows.batch(n, config.batch_size, config.seed)
        batch = OccupancyBatch(*(to_device(leaf, device) for leaf in batch))
        return flow_matching_loss(teacher, batch, config.history_dropout, generator)

    trained, metrics = fit(teacher, loss, config)
    save_occfm_transition(trained, out / TEACHER, metadata=metrics)
    return write_metrics(out / "teacher_metrics.json", metrics)


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


def _latent_scale(store: OccupancyStore) -> float:
    latents = store.array("latents")
    every = max(1, len(latents) // 1000)
    return float(1 / latents[::every].std())
