"""The shapes of a CIFAR-10 run: full copies of a UNet."""

import torch

from mfd_fast.models.cifar10.presets import Cifar10Run
from mfd_fast.models.cifar10.unet import UNet, UNetConfig, load_unet
from mfd_fast.models.images import full_copies
from mfd_fast.run.task import Shapes


def cifar10_shapes(config: Cifar10Run, device: str = "meta") -> Shapes:
    """The teacher's sizes, or without one those of ``mfd-fast pretrain cifar10``."""
    sizes = load_unet(config.teacher).config if config.teacher else UNetConfig()
    with torch.device(device):
        backbone = full_copies(UNet(sizes).eval(), config.distill)
    return Shapes(backbone, lambda batch: torch.zeros(batch, 0, device=device))
