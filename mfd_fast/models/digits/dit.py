"""A small class-conditional diffusion transformer (DiT) that predicts a flow's velocity.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023): patches, adaLN-zero blocks.
Two choices make it quick on a CPU and keep it free of host syncs: the modulations of all blocks
depend on (t, label) only and come from one matmul, and positions are a constant table.

Letters in shapes: B batch, T tokens, D width, C channels, P patch size.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.files.weights import load_network, save_weights
from mfd_fast.settings import Count, Settings

# Times run over [0, 1]; the usual frequencies of a sinusoidal embedding expect 0 to 1000.
TIME_SCALE = 1000.0
MAX_PERIOD = 10_000.0
# Shift, scale and gate of the attention and of the MLP.
MODULATIONS_PER_BLOCK = 6


@dataclass(frozen=True, kw_only=True)
class DiTConfig(Settings):
    """Size of a ``DiT``.  The defaults are the packaged digits teacher: 0.33 M parameters."""

    SECTION: ClassVar[str] = "DiTConfig."

    image_size: Count = 8
    """Height and width of an image in pixels."""
    channels: Count = 1
    """Channels of an image."""
    patch_size: Count = 2
    """Side of the square of pixels that makes one token."""
    width: Count = 64
    """Features of a token; a multiple of 4 (two coordinates, sine and cosine)."""
    depth: Count = 4
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads; they share the width equally."""
    mlp_ratio: Count = 4
    """Hidden features of the MLP, in widths."""
    num_classes: Count = 10
    """Classes; the label ``num_classes`` is one more, the null class of guidance."""
    second_time: bool = False
    """Whether the network also takes the earlier time that a flow map goes to."""

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"DiTConfig.image_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.image_size}"
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"DiTConfig.width must be a multiple of 4 and of heads {self.heads}, "
                f"got {self.width}"
            )


class DiT(nn.Module):
    """Velocity network ``v(x, t, label)`` for square images.

    It starts as the zero field: the modulation and the output layer are zero-initialised.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        grid = config.image_size // config.patch_size
        patch = config.channels * config.patch_size**2
        width = config.width
        self.patch_in = nn.Linear(patch, width)
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embedding = nn.Embedding(config.num_classes + 1, width)
        if config.second_time:
            self.span_mlp = nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
        self.modulation = nn.Linear(width, (MODULATIONS_PER_BLOCK * config.depth + 2) * width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.patch_out = nn.Linear(width, patch)
        self.register_buffer("positions", position_table(grid, width), persistent=False)
        self.register_buffer("frequencies", frequency_table(width), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embedding.weight, std=0.5)
        zeros = [self.modulation, self.patch_out]
        if self.config.second_time:
            zeros.append(self.span_mlp[-1])
        for module in zeros:
            nn.init.zeros_(module.weight)

    @property
    def middle(self) -> nn.Module:
        """The block whose tokens ``[B, T, D]`` a discriminator reads."""
        return self.blocks[self.config.depth // 2]

    @property
    def middle_width(self) -> int:
        """D of :attr:`middle`."""
        return self.config.width

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, end: Tensor | None = None
    ) -> Tensor:
        """Velocity ``v = eps - x_0`` at the state ``x`` and the time ``t``.

        Args:
            x: images ``[B, C, H, W]`` in the dtype of the weights.
            t: times ``[B]`` float32, 1 = noise, 0 = data.
            label: classes ``[B]`` int64, ``num_classes`` for the null class; None is the null
                class for all.  Values are not checked: that would stall the device.
            end: times ``[B]`` float32 that a flow map goes to, for a network with a second time; t
                itself if None.

        Returns:
            ``[B, C, H, W]`` in the dtype of ``x``.

        Raises:
            ValueError: a shape does not fit the config.
        """
        self._check(x, t, label, end)
        tokens = self.patch_in(self._patchify(x)) + self.positions
        modulation = self.modulation(F.silu(self._condition(t, label, end))).unsqueeze(1)
        *per_block, shift, scale = modulation.chunk(
            MODULATIONS_PER_BLOCK * self.config.depth + 2, dim=-1
        )
        for i, block in enumerate(self.blocks):
            first = i * MODULATIONS_PER_BLOCK
            tokens = block(tokens, per_block[first : first + MODULATIONS_PER_BLOCK])
        return self._unpatchify(self.patch_out(modulated_norm(tokens, shift, scale)))

    def _check(self, x: Tensor, t: Tensor, label: Tensor | None, end: Tensor | None) -> None:
        cfg = self.config
        image = (cfg.channels, cfg.image_size, cfg.image_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != image:
            raise ValueError(
                f"DiT: x must be images of shape [B, {', '.join(map(str, image))}]; "
                f"got {list(x.shape)}"
            )
        if end is not None and not cfg.second_time:
            raise ValueError("DiT: end needs a network with DiTConfig.second_time; drop end")
        for name, value in (("t", t), ("label", label), ("end", end)):
            if value is not None and value.shape != x.shape[:1]:
                raise ValueError(
                    f"DiT: {name} must have one value per image, shape [{x.shape[0]}]; "
                    f"got {list(value.shape)}"
                )

    def _condition(self, t: Tensor, label: Tensor | None, end: Tensor | None) -> Tensor:  # [B, D]
        classes = self.label_embedding.weight
        label_features = classes[-1] if label is None else F.embedding(label, classes)
        condition = self.time_mlp(self._waves(t)) + label_features
        if not self.config.second_time:
            return condition
        return condition + self.span_mlp(
            self._waves(torch.zeros_like(t) if end is None else t - end)
        )

    def _waves(self, t: Tensor) -> Tensor:  # [B] -> [B, D]
        return time_waves(t, self.frequencies).to(self.label_embedding.weight.dtype)

    def _patchify(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, T, C * P * P]
        p = self.config.patch_size
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpatchify(self, tokens: Tensor) -> Tensor:  # [B, T, C * P * P] -> [B, C, H, W]
        p, channels = self.config.patch_size, self.config.channels
        grid = self.config.image_size // p
        patches = tokens.unflatten(2, (channels, p, p)).unflatten(1, (grid, grid))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Block(nn.Module):
    """Attention and MLP, each with a modulated norm before and a gate after (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)

    def forward(self, tokens: Tensor, modulation: list[Tensor]) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``; ``modulation``: six tensors ``[B, 1, D]``."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        attended = self._attend(modulated_norm(tokens, shift_a, scale_a))
        tokens = torch.addcmul(tokens, gate_a, attended)
        hidden = F.gelu(self.mlp_in(modulated_norm(tokens, shift_m, scale_m)))
        return torch.addcmul(tokens, gate_m, self.mlp_out(hidden))

    def _attend(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


def modulated_norm(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``layer_norm(tokens) * (1 + scale) + shift``; tokens ``[B, T, D]``, others ``[B, 1, D]``."""
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:]), 1 + scale)


def time_waves(t: Tensor, frequencies: Tensor) -> Tensor:
    """Sinusoidal embedding ``[B, D]`` float32 of times ``[B]``; frequencies ``[D / 2]``."""
    angle = TIME_SCALE * t.float()[:, None] * frequencies.float()
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def frequency_table(width: int) -> Tensor:
    """Angular frequencies of the time embedding, ``[width / 2]`` float32, from 1 downwards."""
    half = width // 2
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / half)


def position_table(grid: int, width: int) -> Tensor:
    """Sine and cosine of the row and of the column of each token, ``[grid * grid, width]``."""
    quarter = width // 4
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(quarter) / quarter)
    angle = torch.arange(grid)[:, None] * frequency
    waves = torch.cat((angle.sin(), angle.cos()), dim=-1)  # [grid, width / 2]
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def save_dit(model: DiT, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write weights, config and ``metadata`` (JSON values) to one safetensors file, atomically."""
    save_weights(model, path, kind="dit", config=asdict(model.config), metadata=metadata or {})


def load_dit(path: str | Path) -> DiT:
    """Read a ``DiT`` back from ``save_dit``'s file: float32, bit for bit, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is something else, or does not fit its own config.
    """
    return load_network(path, "dit", DiTConfig, DiT)
