"""An unconditional UNet that predicts a flow's velocity on CIFAR-10: 40.9 M parameters.

The network of Ho et al., "Denoising Diffusion Probabilistic Models" (2020), appendix B, with
attention at 16, 8 and 4 pixels, one head every 64 channels, and time that scales and shifts; the
MFD paper says of its own only that it is a UNet of about 42 M parameters (D.1).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.files.weights import load_network, save_weights
from mfd_fast.models.digits.dit import frequency_table, time_waves
from mfd_fast.settings import Count, Decay, Settings

GROUPS = 32
HEAD_CHANNELS = 64
EMBEDDING_RATIO = 4  # width of the time features, in base channels


@dataclass(frozen=True, kw_only=True)
class UNetConfig(Settings):
    """Size of a ``UNet``.  The defaults are the CIFAR-10 network."""

    SECTION: ClassVar[str] = "UNetConfig."

    image_size: Count = 32
    """Height and width of an image in pixels."""
    channels: Count = 3
    """Channels of an image."""
    width: Count = 128
    """Channels of the finest level; a multiple of 32."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of every level, in widths; each level halves the resolution."""
    blocks: Count = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    attention_levels: tuple[int, ...] = (1, 2, 3)
    """Levels with attention after every block, counted from 0."""
    dropout: Decay = 0.0
    """Share of activations dropped inside a block in training mode."""
    second_time: bool = False
    """Whether the network also takes the earlier time that a flow map goes to."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("multipliers", "attention_levels"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.width < GROUPS or self.width % GROUPS:
            raise ValueError(f"UNetConfig.width must be a multiple of {GROUPS}, got {self.width}")
        smallest = 2 ** (len(self.multipliers) - 1)
        if self.image_size % smallest:
            raise ValueError(
                f"UNetConfig.image_size must be a multiple of {smallest} for "
                f"{len(self.multipliers)} levels, got {self.image_size}"
            )


class UNet(nn.Module):
    """Velocity network ``v(x, t, cond)``; the condition is not looked at.

    It starts as the zero field: its last layer and the end of every block are zero-initialised.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width, features = config.width, EMBEDDING_RATIO * config.width
        sizes = [width * multiplier for multiplier in config.multipliers]
        self.time_mlp = _time_mlp(width, features)
        if config.second_time:
            self.span_mlp = _time_mlp(width, features)
            nn.init.zeros_(self.span_mlp[-1].weight)
            nn.init.zeros_(self.span_mlp[-1].bias)
        self.enter = nn.Conv2d(config.channels, width, 3, padding=1)
        self.down, kept = nn.ModuleList(), [width]
        for level, size in enumerate(sizes):
            for _ in range(config.blocks):
                self.down.append(Stage(kept[-1], size, features, config, level))
                kept.append(size)
            if level < len(sizes) - 1:
                self.down.append(Resample(size, is_up=False))
                kept.append(size)
        self.middle = Middle(sizes[-1], features, config)
        self.up, current = nn.ModuleList(), sizes[-1]
        for level, size in reversed(list(enumerate(sizes))):
            for _ in range(config.blocks + 1):
                self.up.append(Stage(current + kept.pop(), size, features, config, level))
                current = size
            if level:
                self.up.append(Resample(size, is_up=True))
        self.leave = nn.Sequential(
            nn.GroupNorm(GROUPS, current),
            nn.SiLU(),
            nn.Conv2d(current, config.channels, 3, padding=1),
        )
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)
        self.register_buffer("frequencies", frequency_table(width), persistent=False)

    @property
    def middle_width(self) -> int:
        """Channels of ``middle``, which a discriminator reads."""
        return self.config.width * self.config.multipliers[-1]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, end: Tensor | None = None) -> Tensor:
        """Velocity ``v = eps - x_0`` ``[B, C, H, W]`` at the state x and the time t.

        Args:
            x: images ``[B, C, H, W]`` in the dtype of the weights.
            t: times ``[B]`` float32, 1 = noise, 0 = data.
            cond: ignored; the network is unconditional.
            end: times ``[B]`` that a flow map goes to, for a network with a second time; t itself
                if None.

        Raises:
            ValueError: a shape does not fit the config.
        """
        self._check(x, t, end)
        features = F.silu(self._time_features(t, end))
        x = self.enter(x)
        kept = [x]
        for layer in self.down:
            x = layer(x, features)
            kept.append(x)
        x = self.middle(x, features)
        for layer in self.up:
            x = layer(x if isinstance(layer, Resample) else torch.cat((x, kept.pop()), 1), features)
        return self.leave(x)

    def _check(self, x: Tensor, t: Tensor, end: Tensor | None) -> None:
        image = (self.config.channels, self.config.image_size, self.config.image_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != image:
            raise ValueError(
                f"UNet: x must be images of shape [B, {', '.join(map(str, image))}]; "
                f"got {list(x.shape)}"
            )
        if end is not None and not self.config.second_time:
            raise ValueError("UNet: end needs a network with UNetConfig.second_time; drop end")
        for name, value in (("t", t), ("end", end)):
            if value is not None and value.shape != x.shape[:1]:
                raise ValueError(
                    f"UNet: {name} must have one value per image, shape [{x.shape[0]}]; "
                    f"got {list(value.shape)}"
                )

    def _time_features(self, t: Tensor, end: Tensor | None) -> Tensor:  # [B] -> [B, D]
        dtype = self.enter.weight.dtype
        features = self.time_mlp(time_waves(t, self.frequencies).to(dtype))
        if not self.config.second_time:
            return features
        span = torch.zeros_like(t) if end is None else t - end
        return features + self.span_mlp(time_waves(span, self.frequencies).to(dtype))


class Stage(nn.Module):
    """A residual block, and attention where the level has it."""

    def __init__(self, width_in: int, width: int, features: int, config: UNetConfig, level: int):
        super().__init__()
        self.block = Residual(width_in, width, features, config.dropout)
        has_attention = level in config.attention_levels
        self.attention = Attention(width) if has_attention else nn.Identity()

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C, H, W]``."""
        return self.attention(self.block(x, features))


class Middle(nn.Module):
    """Block, attention, block at the coarsest level."""

    def __init__(self, width: int, features: int, config: UNetConfig):
        super().__init__()
        self.first = Residual(width, width, features, config.dropout)
        self.attention = Attention(width)
        self.second = Residual(width, width, features, config.dropout)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same."""
        return self.second(self.attention(self.first(x, features)), features)


class Residual(nn.Module):
    """Two 3x3 convolutions; the time scales and shifts between them."""

    def __init__(self, width_in: int, width: int, features: int, dropout: float):
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, width_in)
        self.conv_in = nn.Conv2d(width_in, width, 3, padding=1)
        self.modulation = nn.Linear(features, 2 * width)
        self.norm_out = nn.GroupNorm(GROUPS, width)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` and time features ``[B, D]`` to ``[B, C, H, W]``."""
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.modulation(features)[..., None, None].chunk(2, dim=1)
        hidden = torch.addcmul(shift, self.norm_out(hidden), 1 + scale)
        return self.skip(x) + self.conv_out(self.dropout(F.silu(hidden)))


class Attention(nn.Module):
    """Self-attention of the pixels, added to the image; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_CHANNELS)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same."""
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, H W, C / heads]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).flatten(1, 2).unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Half or twice the resolution, with a 3x3 convolution."""

    def __init__(self, width: int, *, is_up: bool):
        super().__init__()
        self.is_up = is_up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if is_up else 2, padding=1)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, 2H, 2W]`` or ``[B, C, H/2, W/2]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.is_up else x)


def _time_mlp(width: int, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, features), nn.SiLU(), nn.Linear(features, features))


def save_unet(model: UNet, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write weights, config and ``metadata`` (JSON values) to one safetensors file, atomically."""
    save_weights(model, path, kind="unet", config=asdict(model.config), metadata=metadata or {})


def load_unet(path: str | Path) -> UNet:
    """Read a ``UNet`` back from ``save_unet``'s file: float32, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is something else, or does not fit its own config.
    """
    return load_network(path, "unet", UNetConfig, UNet)
