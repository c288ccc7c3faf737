"""What an OccFM run trains, full copies or two adapters, and its shapes without a checkpoint."""

import torch
from torch import Generator, Tensor

from mfd_fast.backbones.activation import apply_activation_policy
from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.backbones.networks import names_of
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.models.occfm.config import CONFIGS
from mfd_fast.models.occfm.network import BLOCKS, OccfmNetwork, null_condition
from mfd_fast.models.occfm.presets import OccfmRun
from mfd_fast.run.task import Shapes


def occfm_backbone(network: OccfmNetwork, config: OccfmRun) -> CopiedBackbone | SharedBackbone:
    """What is trained, predicted and timed: copies of ``network``, or adapters if it has a rank."""
    settings, policy = config.occfm, config.train.activation
    known = {"sample_shape": network.config.sample_shape, "null_cond": null_condition}
    if not settings.rank:
        copies = CopiedBackbone(network, **known)
        apply_activation_policy(copies.student, policy, BLOCKS)
        return copies
    bank = AdapterBank(
        network,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=names_of(settings.targets),
        generator=Generator().manual_seed(config.distill.seed),
    )
    return SharedBackbone(network, adapters=bank, activation=policy, blocks=BLOCKS, **known)


def occfm_shapes(config: OccfmRun, device: str = "meta") -> Shapes:
    """An OccFM of the published sizes, or of ``occfm-tiny``'s."""
    sizes = CONFIGS["tiny" if config.preset == "occfm-tiny" else "occfm"]
    with torch.device(device):
        network = OccfmNetwork(sizes).to(getattr(torch, config.occfm.dtype))

    def cond(batch: int) -> dict[str, Tensor]:
        history = (batch, sizes.history, *sizes.latent_shape)
        return {
            "history": torch.zeros(history, device=device),
            "trajectory": torch.zeros(batch, sizes.frames, 2, device=device),
        }

    schedule = network.schedule(config.distill.student_steps)
    return Shapes(occfm_backbone(network, config), cond, schedule)
