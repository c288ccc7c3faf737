"""What enters the blocks: time (and guidance), text, patches and their positions.

Letters in shapes: R rows, L text tokens, T image tokens, C width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.models.sana.blocks import MODULATIONS, ConvWeights
from mfd_fast.models.sana.config import SanaConfig
from mfd_fast.models.sana.packing import PackedModule

WAVES = 256  # channels of the sinusoidal embedding of a time
MAX_PERIOD = 10_000.0
TIMESTEPS = 1000  # times in [0, 1] are timesteps in [0, 1000]; also the grid of the time table


def waves(values: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines, then sines of ``[R]`` values at ``[WAVES / 2]`` frequencies: ``[R, WAVES]``."""
    angle = values.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, inputs: int, width: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.activation = activation
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class TimeEmbedding(PackedModule):
    """Modulation of all blocks ``[R, 6 * C]`` and of the head ``[R, C]`` from the time.

    The names of its parameters depend on whether the guidance scale is an input, as in diffusers.
    """

    DERIVED = ("_frequencies",)

    def __init__(self, width: int, *, has_guidance: bool, timestep_scale: float):
        super().__init__()
        self.timestep_scale = timestep_scale
        if has_guidance:
            self.timestep_embedder = Mlp(WAVES, width, nn.SiLU())
            self.guidance_embedder = Mlp(WAVES, width, nn.SiLU())
        else:
            self.emb = nn.Module()
            self.emb.timestep_embedder = Mlp(WAVES, width, nn.SiLU())
        self.linear = nn.Linear(width, MODULATIONS * width)
        self.pack()

    def pack(self) -> None:
        """The frequencies stay float32 whatever the network is cast to."""
        steps = torch.arange(WAVES // 2, dtype=torch.float32, device=self.linear.weight.device)
        self._frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / (WAVES // 2))

    def forward(self, timestep: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        """timestep ``[R]`` float32 in [0, 1000]; guidance ``[R, C]`` from :meth:`guide` or None."""
        embedder = self.timestep_embedder if guidance is not None else self.emb.timestep_embedder
        embedding = embedder(self._waves(timestep * self.timestep_scale))
        if guidance is not None:
            embedding = embedding + guidance
        return self.linear(F.silu(embedding)), embedding

    def guide(self, guidance: Tensor) -> Tensor:
        """The part of the guidance scale ``[R]`` in the embedding, ``[R, C]``."""
        return self.guidance_embedder(self._waves(guidance))

    def _waves(self, values: Tensor) -> Tensor:
        return waves(values, self._frequencies).to(self.linear.weight.dtype)


class PatchEmbedding(nn.Module):
    """Latents ``[R, in, H, W]`` as tokens ``[R, T, C]``, and tokens as latents."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = ConvWeights(nn.Conv2d(config.in_channels, config.width, patch, patch))
        self.patch, self.channels = patch, config.in_channels
        self.scale, self.base = config.interpolation_scale, config.sample_size // patch
        self._positions: dict[tuple, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        patch = self.patch
        size = (x.shape[2] // patch, x.shape[3] // patch)
        split = x.unflatten(3, (size[1], patch)).unflatten(2, (size[0], patch))
        pixels = split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens = F.linear(pixels, self.proj.matrix(), self.proj.bias)
        if self.scale is None:
            return tokens
        return (tokens + self._position_table(size, x.device)).to(tokens.dtype)

    def restore(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens ``[R, height * width, patch^2 * in]`` of the last projection as latents."""
        patch = self.patch
        pixels = tokens.unflatten(2, (patch, patch, self.channels)).unflatten(1, (height, width))
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).contiguous()

    def _position_table(self, size: tuple[int, int], device: torch.device) -> Tensor:
        key = (size, device)
        if key not in self._positions:
            table = position_table(size, self.proj.weight.shape[0], self.base, self.scale)
            self._positions[key] = table.to(device)
        return self._positions[key]


def position_table(size: tuple[int, int], width: int, base: int, scale: float) -> Tensor:
    """Sines and cosines of every token's column, then of its row: float32 ``[T, width]``.

    Coordinates run over ``[0, base / scale)`` whatever the size, so larger images are interpolated.
    """
    rows, columns = (
        torch.arange(count, dtype=torch.float32) / (count / base) / scale for count in size
    )
    quarter = width // 4
    frequency = 1.0 / MAX_PERIOD ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def waves_of(positions: Tensor) -> Tensor:
        angle = positions.double()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    across = waves_of(columns)[None].expand(*size, -1)
    down = waves_of(rows)[:, None].expand(*size, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1).float()
