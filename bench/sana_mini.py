"""SANAs with random weights for the benchmarks, for code that must run without diffusers.

``bench.sana_sizes`` has the same sizes as diffusers' model (``tests/bench/test_bench_step.py``).
"""

import torch

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.backbones.shared import SharedBackbone
from mfd_fast.models.sana import BLOCKS, SanaConfig, SanaNetwork
from mfd_fast.run.task import Shapes

MINI = {
    **{"num_layers": 8, "num_attention_heads": 16, "attention_head_dim": 32},
    **{"num_cross_attention_heads": 8, "cross_attention_head_dim": 64},
    **{"caption_channels": 512, "sample_size": 16},
}
TINY = {
    **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
    **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 16},
    **{"caption_channels": 32, "sample_size": 2},
}
CONFIGS: dict[str, dict[str, int]] = {"tiny": TINY, "mini": MINI, "1.6b": {}}
TEXT = 60  # tokens of a prompt without its padding


def make_model(
    size: str, device: str, dtype: torch.dtype, *, activation: str = "none", side: int = 0
) -> Shapes:
    """A SANA of ``CONFIGS`` on a device with adapters of rank 64, and prompts without padding.

    side: of its latents; the size's own if 0.
    """
    config = SanaConfig(**CONFIGS[size])
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

    def cond(batch: int) -> dict[str, torch.Tensor]:
        text = torch.zeros(batch, *shape, dtype=dtype, device=device)
        return {"text": text, "mask": torch.ones(batch, TEXT, dtype=torch.bool, device=device)}

    return Shapes(backbone, cond)
