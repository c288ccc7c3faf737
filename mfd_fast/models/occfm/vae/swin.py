"""Swin-V2 blocks over a square image (Liu et al., "Swin Transformer V2", arXiv 2111.09883).

Cosine attention in windows of 5 x 5, a learned scale per head, a position bias from a small network
of log-spaced offsets, norms after the branches.  Every other block shifts its windows by 2.

Letters in shapes: B images, R side, C channels, H heads, n = (R / 5)^2 windows, L = 25 tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.occfm.vae.config import SHIFT, WINDOW

TOKENS = WINDOW * WINDOW
BIAS_WIDTH = 512  # hidden features of the network of the position bias
BIAS_MAX = 16.0
MAX_LOG_SCALE = math.log(100.0)
MASKED = -100.0


def cut_windows(x: Tensor) -> Tensor:
    """``[B, R, R, C]`` to ``[B n, L, C]``: windows in raster order, raster order inside."""
    batch, side, _, channels = x.shape
    cut = x.reshape(batch, side // WINDOW, WINDOW, side // WINDOW, WINDOW, channels)
    return cut.transpose(2, 3).reshape(-1, TOKENS, channels)


def join_windows(windows: Tensor, side: int) -> Tensor:
    """The inverse of :func:`cut_windows`."""
    across = side // WINDOW
    cut = windows.reshape(-1, across, across, WINDOW, WINDOW, windows.shape[-1])
    return cut.transpose(2, 3).reshape(-1, side, side, windows.shape[-1])


def relative_coords() -> Tensor:
    """Offsets -4 .. 4 of row and column, log-spaced: ``[1, 9, 9, 2]``, row first."""
    offset = torch.arange(1 - WINDOW, WINDOW, dtype=torch.float32)
    spaced = offset.sign() * torch.log2(8 * offset.abs() / (WINDOW - 1) + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(spaced, spaced, indexing="ij"), dim=-1)[None]


def relative_index() -> Tensor:
    """Which of the 81 offsets leads from key to query: ``[L, L]`` int64."""
    row, column = torch.arange(TOKENS) // WINDOW, torch.arange(TOKENS) % WINDOW
    rows, columns = row[:, None] - row, column[:, None] - column
    return (rows + WINDOW - 1) * (2 * WINDOW - 1) + columns + WINDOW - 1


def shift_mask(side: int) -> Tensor:
    """-100 between tokens that only the cyclic shift brought together, else 0: ``[n, L, L]``."""
    place = torch.arange(side)
    label = (place >= side - WINDOW).long() + (place >= side - SHIFT).long()
    region = (3 * label[:, None] + label).reshape(1, side, side, 1)
    region = cut_windows(region).squeeze(-1)
    return (region[:, :, None] != region[:, None, :]) * MASKED


class WindowAttention(nn.Module):
    """Cosine attention inside windows ``[B n, L, C]``, with a position bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("relative_coords_table", relative_coords())
        self.register_buffer("relative_position_index", relative_index())
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, BIAS_WIDTH), nn.ReLU(), nn.Linear(BIAS_WIDTH, heads, bias=False)
        )
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def scale(self) -> Tensor:
        """Of the cosines, ``[H, 1, 1]``."""
        return self.logit_scale.clamp(max=MAX_LOG_SCALE).exp()

    def qkv_bias(self) -> Tensor:
        """Keys have none: ``[3 C]``."""
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def position_bias(self) -> Tensor:
        """What is added to the scores of every window, ``[H, L, L]``.

        The index is the checkpoint's, which may be damaged (see ``loading``): it is never remade.
        """
        table = self.cpb_mlp(self.relative_coords_table).reshape(-1, self.heads)
        return (BIAS_MAX * torch.sigmoid(table))[self.relative_position_index].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` is ``[n, L, L]`` or None; windows of one image lie next to each other."""
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias())
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = cosine * self.scale() + self.position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        merged = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(merged)


class Mlp(nn.Module):
    """Two layers with the exact GELU between."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """``[B, R, R, C]`` to the same: attention in windows, then an MLP, normed before the sums."""

    def __init__(self, width: int, heads: int, side: int, *, is_shifted: bool):
        super().__init__()
        self.shift = SHIFT if is_shifted else 0
        mask = shift_mask(side) if is_shifted else None
        self.register_buffer("attn_mask", mask)  # None makes no entry in a state dict
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        rolled = x.roll((-self.shift, -self.shift), dims=(1, 2)) if self.shift else x
        attended = join_windows(self.attn(cut_windows(rolled), self.attn_mask), x.shape[1])
        if self.shift:
            attended = attended.roll((self.shift, self.shift), dims=(1, 2))
        x = x + self.norm1(attended)
        return x + self.norm2(self.mlp(x))


class SwinStage(nn.Module):
    """``depth`` blocks, every second one shifted; images ``[B, C, R, R]`` in and out."""

    def __init__(self, width: int, heads: int, side: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, side, is_shifted=i % 2 == 1) for i in range(depth)
        )

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)
