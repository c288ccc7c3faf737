"""The second half of OccFM's VAE: a latent to the scores of every voxel's classes.

This is the decoder to read, to train and to measure against; :mod:`.fast_decoder` is the one to run
once the weights are frozen.  Letters in shapes: B frames, C latent channels, R side of the latent,
X = Y = 4 R, Z height, K classes, E features of a class.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.occfm.vae.blocks import IMAGE_NORM_EPS, ConvResidual, clip_block, middle
from mfd_fast.models.occfm.vae.config import STAGES, VaeConfig
from mfd_fast.models.occfm.vae.swin import SwinStage


class Upsample(nn.Module):
    """Twice as many pixels in each direction (nearest), then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Decoder(nn.Module):
    """``[B, C, R, R]`` to the map ``[B, Z E, X, Y]`` that :func:`class_scores` reads."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        width, side = config.width, config.latent_grid
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = middle(config)
        self.net_blocks, self.upsample_blocks = nn.ModuleList(), nn.ModuleList()
        self.temporal_block = nn.ModuleList([clip_block(width, config)])
        for stage in range(STAGES):
            depth = config.decoder_depths[stage]
            self.net_blocks.append(SwinStage(width, config.heads, side << stage, depth))
            self.net_blocks.append(ConvResidual(width, config.groups))
            self.upsample_blocks.append(Upsample(width))
        self.norm_out = nn.GroupNorm(config.groups, width, eps=IMAGE_NORM_EPS)
        self.conv_out = nn.Conv2d(width, config.height * config.class_width, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for stage, upsample in enumerate(self.upsample_blocks):
            x = self.net_blocks[2 * stage + 1](self.net_blocks[2 * stage](x))
            x = upsample(self.temporal_block[0](x) if stage == 0 else x)
        return self.conv_out(F.silu(self.norm_out(x)))


def class_scores(decoded: Tensor, class_table: Tensor) -> Tensor:
    """Products of a map ``[B, Z E, X, Y]`` with a class table ``[K, E]``: ``[B, X, Y, Z, K]``."""
    voxels = decoded.permute(0, 2, 3, 1).unflatten(-1, (-1, class_table.shape[1]))
    return voxels @ class_table.mT
