"""What the encoder and the decoder share: convolutions, attention over a frame, over a clip.

Letters in shapes: B images, C channels, R side.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.occfm.vae.config import VaeConfig

IMAGE_NORM_EPS = 1e-6
CLIP_NORM_EPS = 1e-5
CLIP_HEADS = 4


class ConvResidual(nn.Module):
    """``x + conv2(SiLU(norm(conv1(x))))`` on images; no norm before the first convolution."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(groups, width, eps=IMAGE_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm(self.conv1(x))))


class AttentionWeights(nn.Module):
    """The bias-free projections of :class:`DenseAttention`, under their published names."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)


class DenseAttention(nn.Module):
    """``x + conv(attention(norm(x)))``: every pixel of ``[B, C, R, R]`` attends to every other."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.heads = config.dense_heads
        inner = config.dense_heads * config.dense_head_width
        self.norm = nn.GroupNorm(config.groups, config.width, eps=IMAGE_NORM_EPS)
        self.attention = AttentionWeights(config.width, inner)
        self.proj_out = nn.Conv2d(config.width, config.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).mT
        q = self.attention.to_q(tokens)
        k, v = self.attention.to_kv(tokens).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        merged = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        return x + self.proj_out(self.attention.to_out(merged).mT.reshape(x.shape))


def middle(config: VaeConfig) -> nn.Sequential:
    """The blocks at the latent's resolution."""
    return nn.Sequential(
        ConvResidual(config.width, config.groups),
        DenseAttention(config),
        ConvResidual(config.width, config.groups),
    )


class ClipResidual(nn.Module):
    """:class:`ConvResidual` over a clip, ``[B, C, F, R, R]``."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(groups, width, eps=CLIP_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm(self.conv1(x))))


class ClipAttention(nn.Module):
    """Attention over the frames of every pixel, ``[N, F, C]``, by matmul."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, CLIP_HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class ClipBlock(nn.Module):
    """Convolution, attention over the frames, convolution; images ``[B clip, C, R, R]``.

    The attention has no residual: it replaces the signal.
    """

    def __init__(self, width: int, config: VaeConfig):
        super().__init__()
        self.clip = config.clip
        self.temporal_attn = ClipAttention(width)
        self.temporal_conv_1 = ClipResidual(width, config.groups)
        self.temporal_conv_2 = ClipResidual(width, config.groups)

    def forward(self, images: Tensor) -> Tensor:
        x = self.temporal_conv_1(images.unflatten(0, (-1, self.clip)).transpose(1, 2))
        pixels = x.permute(0, 3, 4, 2, 1)  # [B, R, R, F, C]
        attended = self.temporal_attn(pixels.flatten(0, 2)).reshape(pixels.shape)
        x = self.temporal_conv_2(attended.permute(0, 4, 3, 1, 2))
        return x.transpose(1, 2).flatten(0, 1)


def clip_block(width: int, config: VaeConfig) -> nn.Module:
    """A :class:`ClipBlock` in the 3-D VAE, nothing (and no entry in a state dict) in the others."""
    return nn.Identity() if config.clip is None else ClipBlock(width, config)
