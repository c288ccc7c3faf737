"""The first half of OccFM's VAE: class ids to the distribution of a latent.

Letters in shapes: B frames, X = Y = grid, Z height, C latent channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.occfm.vae.blocks import IMAGE_NORM_EPS, ConvResidual, clip_block, middle
from mfd_fast.models.occfm.vae.config import VaeConfig
from mfd_fast.models.occfm.vae.swin import SwinStage

HEIGHT_FEATURES = 4


def height_features(height: int) -> Tensor:
    """``[0, 1, sin(pi h), cos(pi h)]`` of every level's middle h in (0, 1): ``[Z, 4]``."""
    h = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    rows = [torch.zeros_like(h), torch.ones_like(h), (math.pi * h).sin(), (math.pi * h).cos()]
    return torch.stack(rows, dim=1).float()


class OccupancyEmbedding(nn.Module):
    """Class ids ``[B, X, Y, Z]`` to an image ``[B, width, X, Y]``: columns are channels."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        table = height_features(config.height)
        self.height_embedding = nn.Parameter(table, requires_grad=False)
        self.class_embeds = nn.Embedding(config.classes, config.class_width)
        channels = config.height * (config.class_width + HEIGHT_FEATURES)
        self.pre_pillar_feature = nn.Sequential(nn.Conv2d(channels, config.width, 3, padding=1))

    def forward(self, ids: Tensor) -> Tensor:
        classes = self.class_embeds(ids)
        heights = self.height_embedding.expand(*ids.shape, HEIGHT_FEATURES)
        pillars = torch.cat([classes, heights], dim=-1).flatten(3)
        return self.pre_pillar_feature(pillars.permute(0, 3, 1, 2))


class PatchEmbedding(nn.Module):
    """A linear layer and a LayerNorm over the channels of every pixel; ``[B, C, X, Y]``."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(width, width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """``[B, width, X, Y]`` to ``[B, 2 C, X / 4, Y / 4]``: means, then log-variances."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        width, side = config.width, config.grid
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, side * side, width))
        self.patch_embed_layer = PatchEmbedding(width)
        self.net_blocks, self.downsample_blocks = nn.ModuleList(), nn.ModuleList()
        self.temporal_block = nn.ModuleList()
        for depth in config.encoder_depths:
            self.net_blocks.append(SwinStage(width, config.heads, side, depth))
            self.net_blocks.append(ConvResidual(width, config.groups))
            self.downsample_blocks.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
            width, side = 2 * width, side // 2
            self.temporal_block.append(clip_block(width, config))
        self.conv_reduce = nn.Conv2d(width, config.width, 3, padding=1)
        self.mid = middle(config)
        self.norm_out = nn.GroupNorm(config.groups, config.width, eps=IMAGE_NORM_EPS)
        self.conv_out = nn.Conv2d(config.width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed_layer(image)
        x = x + self.absolute_pos_embed.mT.reshape(1, *x.shape[1:])
        for stage, downsample in enumerate(self.downsample_blocks):
            x = self.net_blocks[2 * stage + 1](self.net_blocks[2 * stage](x))
            x = self.temporal_block[stage](downsample(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(self.conv_reduce(x)))))
