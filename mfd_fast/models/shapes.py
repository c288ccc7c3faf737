"""What a preset distils, without storage: shapes for predicting the cost of a run.

Nothing is loaded that is not packaged: a SANA that is no local folder has its published sizes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfd_fast.backbones.float8 import use_float8
from mfd_fast.backbones.lanes import Backbone, CopiedBackbone
from mfd_fast.backbones.networks import names_of
from mfd_fast.baselines.objectives import needs_of
from mfd_fast.cost import MetaModel
from mfd_fast.cost.cycle import is_interval
from mfd_fast.files.plain import read_json
from mfd_fast.models.tasks import check_samples
from mfd_fast.run.config import RunConfig

LATENT_SHRINK = 32  # pixels to a latent pixel in SANA's autoencoder
TEXT_TOKENS = 300  # of a SANA prompt that is not trimmed


def meta_model(config: RunConfig) -> MetaModel:
    """The shapes of ``config``, without what its objective does not train.

    ``ValueError`` for a preset whose shapes are not known here, or that its objective cannot train.
    """
    make = FAMILIES.get(config.TASK)
    if make is None:
        raise ValueError(
            f"the cost of preset {config.preset!r} cannot be predicted: it offers no shapes; "
            f"those of {sorted(FAMILIES)} are known"
        )
    model, needs = make(config), needs_of(config.distill)
    if not is_interval(config.distill):
        _check_compared(config, model.backbone)
    if "aux" not in needs.roles:
        model.backbone.aux = torch.nn.Identity()  # a copy that nobody trains
    if not needs.uses_data:
        return model
    shape = model.backbone.sample_shape

    def with_samples(batch: int) -> tuple[Tensor, Any]:
        return torch.empty(batch, *shape, device="meta"), model.cond(batch)

    return replace(model, cond=with_samples)


def _check_compared(config: RunConfig, backbone: Backbone) -> None:
    """``ValueError`` if the preset cannot be distilled by a ``ComparedObjective``."""
    name = config.distill.objective
    if not isinstance(backbone, CopiedBackbone):
        raise ValueError(
            f"distill.objective={name!r} trains full copies of a network, and preset "
            f"{config.preset!r} trains adapters: take --objective mfd, or preset digits or cifar10"
        )
    check_samples(config)
    if config.train.capture == "on":
        raise ValueError(
            f"distill.objective={name!r} cannot be captured; set train.capture to auto or off"
        )


def digits_model(config: RunConfig) -> MetaModel:
    """The packaged DiT, three full copies."""
    from mfd_fast.models.digits.task import DigitsTask

    backbone = DigitsTask(config).backbone().to("meta")
    return MetaModel(backbone, lambda batch: torch.empty(batch, dtype=int, device="meta"))


def cifar10_model(config: RunConfig) -> MetaModel:
    """A UNet, three full copies: the teacher's sizes, or those of ``pretrain`` without one."""
    from mfd_fast.models.cifar10.unet import UNet, UNetConfig, load_unet

    sizes = load_unet(config.teacher).config if config.teacher else UNetConfig()
    with torch.device("meta"):
        teacher, student = (
            UNet(replace(sizes, second_time=has_second)).eval()
            for has_second in (False, needs_of(config.distill).second_time)
        )
    shape = (sizes.channels, sizes.image_size, sizes.image_size)
    backbone = CopiedBackbone(teacher, student=student, sample_shape=shape)
    return MetaModel(backbone, lambda batch: torch.empty(batch, 0, device="meta"))


def sana_model(config: RunConfig, device: str = "meta") -> MetaModel:
    """A SANA with two adapters on the frozen network; random weights on another device."""
    from mfd_fast.backbones.adapters import AdapterBank
    from mfd_fast.backbones.shared import SharedBackbone
    from mfd_fast.models.sana import BLOCKS, SanaNetwork

    settings, distill = config.sana, config.distill
    sizes, resolution = sana_sizes(config.teacher)
    side = (settings.resolution or resolution) // LATENT_SHRINK
    with torch.device(device):
        network = SanaNetwork(sizes, time_table=bool(distill.grid)).to(
            getattr(torch, settings.dtype)
        )
    bank = AdapterBank(
        network,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=names_of(settings.targets),
    )
    backbone = SharedBackbone(
        network,
        adapters=bank,
        sample_shape=(sizes.in_channels, side, side),
        null_cond=lambda cond: cond,
        activation=config.train.activation,
        blocks=BLOCKS,
    )
    if config.train.float8:
        use_float8(backbone)
    length = settings.text_length or TEXT_TOKENS
    shape = (length, sizes.caption_channels)
    return MetaModel(backbone, partial(_text, shape, network.dtype, device))


def sana_sizes(teacher: str) -> tuple[Any, int]:
    """``SanaConfig`` and image side in pixels of a checkpoint folder or of a published name."""
    from mfd_fast.models.sana import SanaConfig
    from mfd_fast.models.sana.tiny import TRANSFORMER

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


# transformer/config.json of Sana_600M; SanaConfig's defaults are those of Sana_1600M.
SANA_600M = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
}


def occfm_model(config: RunConfig) -> MetaModel:
    """An OccFM: three full copies, or two adapters on the frozen network."""
    from mfd_fast.backbones.activation import apply_activation_policy
    from mfd_fast.backbones.adapters import AdapterBank
    from mfd_fast.backbones.shared import SharedBackbone
    from mfd_fast.models.occfm import BLOCKS, CONFIGS, OccfmNetwork, null_condition

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
            targets=names_of(settings.targets),
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


def _text(
    shape: tuple[int, int], dtype: torch.dtype, device: str, batch: int
) -> Mapping[str, Tensor]:
    return {
        "text": torch.zeros(batch, *shape, dtype=dtype, device=device),
        "mask": torch.ones(batch, shape[0], dtype=torch.bool, device=device),
    }


FAMILIES: dict[str, Callable[[RunConfig], MetaModel]] = {
    "mfd_fast.models.digits.task:DigitsTask": digits_model,
    "mfd_fast.models.cifar10.task:Cifar10Task": cifar10_model,
    "mfd_fast.models.sana.task:SanaTask": sana_model,
    "mfd_fast.models.occfm.task:OccfmTask": occfm_model,
}
