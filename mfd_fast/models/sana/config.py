"""The configuration of a SANA transformer: the keys of diffusers' ``transformer/config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from mfd_fast.ops.checks import MAX_CHANNELS
from mfd_fast.ops.linear_attention import WIDTHS
from mfd_fast.settings import Count, Positive, Settings

CLASS_NAME = "SanaTransformer2DModel"
QK_NORMS = (None, "rms_norm_across_heads")

# diffusers knows these; no published SANA uses another value, and it would change the function.
FIXED = {"norm_elementwise_affine": False, "dropout": 0.0}


@dataclass(frozen=True, kw_only=True)
class SanaConfig(Settings):
    """What decides the shapes and the function of a ``SanaNetwork``; defaults: SANA 1.6B, 1024px.

    Names and meanings are diffusers'.  ``ValueError`` names what is not supported here.
    """

    SECTION: ClassVar[str] = "SanaConfig."

    in_channels: Count = 32
    """Channels of the latent; the output has as many."""
    num_layers: Count = 20
    """Transformer blocks."""
    num_attention_heads: Count = 70
    """Heads of the linear self-attention."""
    attention_head_dim: Count = 32
    """Width of one of them; a power of two from 4 to 128."""
    num_cross_attention_heads: Count = 20
    """Heads of the attention to text."""
    cross_attention_head_dim: Count = 112
    """Width of one of them."""
    caption_channels: Count = 2304
    """Channels of a text token (Gemma-2-2B)."""
    mlp_ratio: Positive = 2.5
    """Hidden channels of the gated convolution, in widths."""
    attention_bias: bool = False
    """Whether q, k and v of the self-attention have a bias."""
    sample_size: Count = 32
    """Side of the latent image it was made for; scales the positional embedding, if any."""
    patch_size: Count = 1
    """Side of the square of latent pixels that makes a token."""
    norm_eps: Positive = 1e-6
    """Added to the variances of the two norms in a block."""
    interpolation_scale: Positive | None = None
    """Scale of the sinusoidal positional embedding; None for no embedding."""
    guidance_embeds: bool = False
    """Whether the guidance scale is an input (SANA-Sprint)."""
    guidance_embeds_scale: Positive = 0.1
    """What diffusers' pipeline multiplies the guidance scale by before it enters the network."""
    qk_norm: str | None = None
    """``"rms_norm_across_heads"`` (SANA 1.5, Sprint) or None."""
    timestep_scale: Positive = 1.0
    """What diffusers' pipeline multiplies the timestep 1000 t by."""

    def __post_init__(self):
        super().__post_init__()
        if self.attention_head_dim not in WIDTHS:
            raise ValueError(
                f"SanaConfig.attention_head_dim must be one of {list(WIDTHS)} for the fused linear "
                f"attention, got {self.attention_head_dim!r}"
            )
        if self.width > MAX_CHANNELS or self.width % 2:
            raise ValueError(
                f"SanaConfig: num_attention_heads x attention_head_dim must be even and at most "
                f"{MAX_CHANNELS}, got {self.width}"
            )
        if self.qk_norm not in QK_NORMS:
            raise ValueError(
                f"SanaConfig.qk_norm must be one of {list(QK_NORMS)}, got {self.qk_norm!r}"
            )
        if self.has_positions and self.width % 4:
            raise ValueError(
                "SanaConfig.interpolation_scale needs a width that is a multiple of 4 (sine and "
                f"cosine of two coordinates), got width {self.width}"
            )

    @property
    def has_positions(self) -> bool:
        """Whether positions are embedded."""
        return self.interpolation_scale is not None

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Channels of the gated convolution after its gate."""
        return int(self.mlp_ratio * self.width)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "SanaConfig":
        """Read diffusers' ``config.json``; a key that is not there has diffusers' default.

        ``ValueError`` names the class or the key that this network does not compute.
        """
        found = entries.get("_class_name", CLASS_NAME)
        if found != CLASS_NAME:
            raise ValueError(f"expected the config of a {CLASS_NAME}, got one of a {found}")
        entries = {key: value for key, value in entries.items() if not key.startswith("_")}
        for key, value in FIXED.items():
            if entries.pop(key, value) != value:
                raise ValueError(f"{key} other than {value} is not supported here")
        in_channels = entries.get("in_channels", cls.in_channels)
        outputs = entries.pop("out_channels", None) or in_channels
        if outputs != in_channels:
            raise ValueError(
                f"out_channels must equal in_channels {in_channels}: the output is a velocity; "
                f"got {outputs}"
            )
        text_width = entries.pop("cross_attention_dim", ())
        known = {field.name for field in fields(cls)}
        if unknown := sorted(entries.keys() - known):
            raise ValueError(
                f"the config key {unknown[0]!r} is unknown here; a {CLASS_NAME} has {sorted(known)}"
            )
        config = cls(**entries)
        if text_width not in ((), config.width):
            raise ValueError(
                f"cross_attention_dim must be num_attention_heads x attention_head_dim = "
                f"{config.width}, the width of the projected text; got {text_width}"
            )
        return config
