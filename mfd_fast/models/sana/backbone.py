"""What a SANA run trains: adapters on the frozen network; its shapes without a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.networks import names_of
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.files.plain import read_json
from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.network import BLOCKS, SanaNetwork
from mfd_fast.models.sana.presets import SanaRun
from mfd_fast.models.sana.tiny import TRANSFORMER
from mfd_fast.run.task import Shapes

LATENT_SHRINK = 32  # pixels to a latent pixel in SANA's autoencoder
TEXT_TOKENS = 300  # of a prompt that is not trimmed
FEW = 2  # blocks; with one, the memory of a phase could peak at another place than with all
# transformer/config.json of Sana_600M; SanaConfig's defaults are those of Sana_1600M.
SANA_600M = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
}


def sana_backbone(
    network: nn.Module,
    config: SanaRun,
    *,
    sample_shape: tuple[int, int, int],
    null_cond: Callable[[Any], Any],
) -> SharedBackbone:
    """Adapters of the run's rank on ``network``: what is trained, predicted and timed."""
    settings = config.sana
    bank = AdapterBank(
        network,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=names_of(settings.targets),
        generator=Generator().manual_seed(config.distill.seed),
    )
    return SharedBackbone(
        network,
        adapters=bank,
        sample_shape=sample_shape,
        null_cond=null_cond,
        activation=config.train.activation,
        blocks=BLOCKS,
    )


def sana_terms(config: SanaRun) -> list[tuple[int, Shapes]]:
    """See :meth:`RunConfig.terms`: all blocks are alike, so few of them, and one more.

    All of them where blocks are recomputed: memory peaks in a block with few, and at the gradients
    with many.
    """
    depth = sana_sizes(config.teacher)[0].num_layers
    if depth <= FEW or config.train.activation == "block":
        return [(1, sana_shapes(config))]
    more = depth - FEW
    return [(n, sana_shapes(config, depth=d)) for n, d in ((1 - more, FEW), (more, FEW + 1)) if n]


def sana_shapes(config: SanaRun, device: str = "meta", *, depth: int | None = None) -> Shapes:
    """A SANA of the run's sizes, or of ``depth`` blocks; one that is no local folder has its
    published sizes.
    """
    settings = config.sana
    sizes, resolution = sana_sizes(config.teacher)
    sizes = replace(sizes, num_layers=depth or sizes.num_layers)
    side = (settings.resolution or resolution) // LATENT_SHRINK
    with torch.device(device):
        network = SanaNetwork(sizes, time_table=bool(config.distill.grid))
    network = network.to(getattr(torch, settings.dtype))
    length = settings.text_length or TEXT_TOKENS

    def cond(batch: int) -> dict[str, Tensor]:
        text = (batch, length, sizes.caption_channels)
        return {
            "text": torch.zeros(text, dtype=network.dtype, device=device),
            "mask": torch.ones(batch, length, dtype=torch.bool, device=device),
        }

    shape = (sizes.in_channels, side, side)
    same = sana_backbone(network, config, sample_shape=shape, null_cond=lambda cond: cond)
    return Shapes(same, cond)


def sana_sizes(teacher: str) -> tuple[SanaConfig, int]:
    """Sizes and image side in pixels of a checkpoint folder or of a published name."""
    if not teacher:  # sana-tiny distils random weights
        sizes = SanaConfig.from_dict(TRANSFORMER)
        return sizes, sizes.sample_size * LATENT_SHRINK
    path = Path(teacher) / "transformer" / "config.json"
    if path.is_file():
        sizes = SanaConfig.from_dict(read_json(path))
        return sizes, sizes.sample_size * sizes.patch_size * LATENT_SHRINK
    resolution = next((side for side in (512, 1024, 2048) if f"{side}px" in teacher), 1024)
    if "_600M" in teacher:  # and not _1600M
        return SanaConfig(**SANA_600M), resolution
    return SanaConfig(), resolution
