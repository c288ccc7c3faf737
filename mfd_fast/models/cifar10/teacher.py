"""The CIFAR-10 teacher: an unconditional UNet trained by flow matching.

    mfd-fast pretrain cifar10 --data DIR --out FOLDER

The paper gives no recipe (D.1); the defaults are close to what flow matching is usually run with on
CIFAR-10: uniform times, batch 128, learning rate 2e-4 after a warm-up, flips, EMA weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mfd_fast.flow.solvers import to_device
from mfd_fast.flow.times import sample_times
from mfd_fast.models.cifar10.data import load_cifar10, to_unit_range
from mfd_fast.models.cifar10.unet import UNet, UNetConfig, save_unet
from mfd_fast.models.fit import FitConfig, fit, make_folder, seeded, write_metrics
from mfd_fast.ops import interpolate_with_target
from mfd_fast.run.device import pick_device
from mfd_fast.settings import Count, CountOrOff, Decay, Positive

TEACHER, METRICS = "teacher.safetensors", "teacher_metrics.json"


@dataclass(frozen=True, kw_only=True)
class Cifar10Pretrain(FitConfig):
    """Training of the CIFAR-10 teacher."""

    data: str = ""
    """Folder of the unpacked CIFAR-10 archive, python or binary version."""
    updates: Count = 400_000
    """Updates in all."""
    batch_size: Count = 128
    """Images of an update."""
    lr: Positive = 2e-4
    """Learning rate after the warm-up."""
    warmup_updates: CountOrOff = 5000
    """Updates over which the learning rate rises linearly."""
    ema_decay: Decay = 0.9999
    """Decay of the average of the weights, which is what is kept."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes cuda if there is one."""
    width: Count = UNetConfig.width
    """Channels of the finest level."""
    blocks: Count = UNetConfig.blocks
    """Residual blocks of a level."""
    dropout: Decay = 0.1
    """Share of activations dropped in training."""


def pretrain(config: Cifar10Pretrain, out: Path) -> dict[str, Any]:
    """Train the teacher; writes ``teacher.safetensors`` and ``teacher_metrics.json``."""
    make_folder(out, TEACHER)
    images, _ = load_cifar10(config.data)
    device = pick_device(config.device)
    size = UNetConfig(width=config.width, blocks=config.blocks, dropout=config.dropout)
    network = seeded(config.seed, lambda: UNet(size)).to(device)
    generator = Generator().manual_seed(config.seed)

    def loss(n: int) -> Tensor:
        rows = torch.randint(len(images), (config.batch_size,), generator=generator)
        x0 = to_device(flipped(to_unit_range(images[rows]), generator), device)
        noise = to_device(torch.randn(x0.shape, generator=generator), device)
        t = to_device(sample_times(config.batch_size, "uniform", generator=generator), device)
        x_t, target = interpolate_with_target(x0, noise, t)
        return F.mse_loss(network(x_t, t), target)

    trained, metrics = fit(network, loss, config)
    save_unet(trained, out / TEACHER, metrics)
    return write_metrics(out / METRICS, metrics)


def flipped(images: Tensor, generator: Generator) -> Tensor:
    """Half of the images ``[B, C, H, W]`` as in a mirror."""
    is_flipped = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(is_flipped, images.flip(3), images)
