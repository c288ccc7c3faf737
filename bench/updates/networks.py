"""Networks with random weights for the benchmarks, for code that must run without diffusers.

``bench.updates.sana_sizes`` has the same SANAs as diffusers' model.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.updates import occfm_reference as reference
from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.models.occfm import CONFIGS, OccfmConfig, OccfmNetwork
from mfd_fast.models.sana import BLOCKS, SanaConfig, SanaNetwork
from mfd_fast.run.task import Shapes

MINI = {
    "num_layers": 8, "num_attention_heads": 16, "attention_head_dim": 32,
    "num_cross_attention_heads": 8, "cross_attention_head_dim": 64,
    "caption_channels": 512, "sample_size": 16,
}  # fmt: skip
TINY = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
    "caption_channels": 32, "sample_size": 2,
}  # fmt: skip
SANAS: dict[str, dict[str, int]] = {"tiny": TINY, "mini": MINI, "1.6b": {}}
TEXT = 60  # tokens of a prompt without its padding
LATENT_STD = 0.1  # of what OccFM's VAE makes; the network sees ten times as much


def make_sana(
    size: str, device: str, dtype: torch.dtype, *, activation: str = "none", side: int = 0
) -> Shapes:
    """A SANA of ``SANAS`` on a device with adapters of rank 64, and prompts without padding.

    side: of its latents; the size's own if 0.
    """
    config = SanaConfig(**SANAS[size])
    with torch.device(device):
        network = SanaNetwork(config, time_table=True).to(dtype)
    backbone = SharedBackbone(
        network,
        adapters=AdapterBank(network),
        sample_shape=(config.in_channels, *(side or config.sample_size,) * 2),
        null_cond=lambda cond: cond,
        activation=activation,
        blocks=BLOCKS,
    )
    shape = (TEXT, config.caption_channels)

    def cond(batch: int) -> dict[str, Tensor]:
        text = torch.zeros(batch, *shape, dtype=dtype, device=device)
        return {"text": text, "mask": torch.ones(batch, TEXT, dtype=torch.bool, device=device)}

    return Shapes(backbone, cond)


def occfm_config(model: str) -> OccfmConfig:
    """Sizes of "occfm", "occfm-tiny" or "occfm-mini": the published widths, 20 x 20 latents."""
    if model == "occfm-mini":
        return replace(CONFIGS["occfm"], grid=20)
    return CONFIGS[model.removeprefix("occfm-")]


def occfm_inputs(
    rows: int, config: OccfmConfig, seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and cond of a call, float32; the first row has no history."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *config.sample_shape, generator=generator)
    history = torch.randn(rows, config.history, *config.latent_shape, generator=generator)
    history[0] = 0
    trajectory = 4 * torch.randn(rows, config.frames, 2, generator=generator)
    t = torch.rand(rows, generator=generator)
    return x, t, {"history": LATENT_STD * history, "trajectory": trajectory}


class ReferenceOccfm(nn.Module):
    """The network as it is specified, as ``network(x, t, cond)``; shares its parameters."""

    def __init__(self, network: OccfmNetwork):
        super().__init__()
        self.network = network

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """``noise - data`` of the future frames, in the dtype of the network."""
        config = self.network.config
        history = (cond["history"] * config.latent_scale).to(self.dtype)
        sequence = torch.cat([history, x.to(self.dtype)], dim=1)
        velocity = reference.velocity(self.network, sequence, 1000 * (1 - t), cond["trajectory"])
        return -velocity[:, config.history :]
