"""What a preset distils, without storage: shapes for predicting the cost of a run.

Nothing is loaded that is not packaged: a SANA that is no local folder has its published sizes.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.config import RunConfig
from mfd_fast.cost import MetaModel

LATENT_SHRINK = 32  # pixels to a latent pixel in SANA's autoencoder
TEXT_TOKENS = 300  # of a SANA prompt that is not trimmed


def meta_model(config: RunConfig) -> MetaModel:
    """The shapes of ``config``; ``ValueError`` for a preset whose shapes are not known here."""
    make = FAMILIES.get(config.TASK)
    if make is None:
        raise ValueError(
            f"the cost of preset {config.preset!r} cannot be predicted: it offers no shapes; "
            f"those of {sorted(FAMILIES)} are known"
        )
    return make(config)


def digits_model(config: RunConfig) -> MetaModel:
    """The packaged DiT, three full copies."""
    from mfd_fast.tasks.digits import DigitsTask

    task = DigitsTask(config)
    task.teacher.to("meta")
    return MetaModel(task.backbone(), lambda batch: torch.empty(batch, dtype=int, device="meta"))


def sana_model(config: RunConfig) -> MetaModel:
    """A SANA with two adapters on the frozen network."""
    from mfd_fast.adapters import AdapterBank
    from mfd_fast.models.sana import BLOCKS, SanaNetwork
    from mfd_fast.shared_backbone import SharedBackbone

    settings, distill = config.sana, config.distill
    sizes, resolution = sana_sizes(config.teacher)
    side = (settings.resolution or resolution) // LATENT_SHRINK
    with torch.device("meta"):
        network = SanaNetwork(sizes, time_table=bool(distill.grid)).to(
            getattr(torch, settings.dtype)
        )
    bank = AdapterBank(
        network,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=tuple(settings.targets.split(",")),
    )
    backbone = SharedBackbone(
        network,
        adapters=bank,
        sample_shape=(sizes.in_channels, side, side),
        null_cond=lambda cond: cond,
        activation=config.train.activation,
        blocks=BLOCKS,
    )
    length = settings.text_length or TEXT_TOKENS
    return MetaModel(backbone, partial(_text, length, sizes.caption_channels, network.dtype))


def sana_sizes(teacher: str) -> tuple[Any, int]:
    """``SanaConfig`` and image side in pixels of a checkpoint folder or of a published name."""
    from mfd_fast.models.sana import SanaConfig
    from mfd_fast.models.sana.tiny import TRANSFORMER

    if not teacher:  # sana-tiny distils random weights
        sizes = SanaConfig.from_dict(TRANSFORMER)
        return sizes, sizes.sample_size * LATENT_SHRINK
    path = Path(teacher) / "transformer" / "config.json"
    if path.is_file():
        sizes = SanaConfig.from_dict(json.loads(path.read_text()))
        return sizes, sizes.sample_size * sizes.patch_size * LATENT_SHRINK
    resolution = next((side for side in (512, 1024, 2048) if f"{side}px" in teacher), 1024)
    if "_600M" in teacher:  # and not _1600M
        return SanaConfig(**SANA_600M), resolution
    return SanaConfig(), resolution


# transformer/config.json of Sana_600M; SanaConfig's defaults are those of Sana_1600M.
SANA_600M = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
}


def occfm_model(config: RunConfig) -> MetaModel:
    """An OccFM: three full copies, or two adapters on the frozen network."""
    from mfd_fast.activation import apply_activation_policy
    from mfd_fast.adapters import AdapterBank
    from mfd_fast.backbone import CopiedBackbone
    from mfd_fast.models.occfm import BLOCKS, CONFIGS, OccfmNetwork, null_condition
    from mfd_fast.shared_backbone import SharedBackbone

    settings = config.occfm
    sizes = CONFIGS["tiny" if config.preset == "occfm-tiny" else "occfm"]
    with torch.device("meta"):
        network = OccfmNetwork(sizes).to(getattr(torch, settings.dtype))
    known = {"sample_shape": sizes.sample_shape, "null_cond": null_condition}
    if settings.rank:
        bank = AdapterBank(
            network,
            rank=settings.rank,
            alpha=settings.alpha,
            targets=tuple(settings.targets.split(",")),
        )
        policy = {"activation": config.train.activation, "blocks": BLOCKS}
        backbone = SharedBackbone(network, adapters=bank, **known, **policy)
    else:
        backbone = CopiedBackbone(network, **known)
        apply_activation_policy(backbone.student, config.train.activation, BLOCKS)

    def cond(batch: int) -> Mapping[str, Tensor]:
        history = (batch, sizes.history, *sizes.latent_shape)
        return {
            "history": torch.empty(history, device="meta"),
            "trajectory": torch.empty(batch, sizes.frames, 2, device="meta"),
        }

    return MetaModel(backbone, cond, network.schedule(config.distill.student_steps))


def _text(length: int, channels: int, dtype: torch.dtype, batch: int) -> Mapping[str, Tensor]:
    return {
        "text": torch.empty(batch, length, channels, dtype=dtype, device="meta"),
        "mask": torch.empty(batch, length, dtype=torch.bool, device="meta"),
    }


FAMILIES: dict[str, Callable[[RunConfig], MetaModel]] = {
    "mfd_fast.tasks.digits:DigitsTask": digits_model,
    "mfd_fast.tasks.sana:SanaTask": sana_model,
    "mfd_fast.tasks.occfm:OccfmTask": occfm_model,
}
