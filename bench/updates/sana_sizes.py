"""SANA with random weights at named sizes: the transformer, its prompts, text encoder and decoder.

    tiny    2 blocks of width 32, 4 latent tokens; to see that everything runs
    mini    8 blocks of width 512, 256 latent tokens; for a CPU
    1.6b    the published configuration at 1024px; for a GPU

Prompts are random embeddings: time does not depend on their values.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image
from torch import Tensor, nn

MAX_TOKENS = 300  # of a prompt, padded
EMPTY_TOKENS = 1  # of the empty prompt: the first token alone
# Tokens in front of every prompt, dropped after encoding: the published instruction has 1,050
# characters, taken at 4.4 a token (no tokenizer was at hand to count).
INSTRUCTION_TOKENS = 240


@dataclass(frozen=True)
class Size:
    """Configurations of the three networks; what is not named is diffusers' or transformers'."""

    transformer: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    side: int = 32
    """Height and width of the latents."""
    prompt_tokens: int = 60
    """Real tokens of a prompt; the rest of the 300 is padding."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return (self.transformer.get("in_channels", 32), self.side, self.side)


SIZES = {
    "tiny": Size(
        transformer={
            "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
            "cross_attention_dim": 32, "caption_channels": 32, "sample_size": 2,
        },
        text_encoder={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "vocab_size": 100, "pad_token_id": 0,
        },
        decoder={"decoder_block_out_channels": (32,) * 6, "decoder_layers_per_block": (1,) * 6},
        side=2,
    ),
    "mini": Size(
        transformer={
            "num_layers": 8, "num_attention_heads": 16, "attention_head_dim": 32,
            "num_cross_attention_heads": 8, "cross_attention_head_dim": 64,
            "cross_attention_dim": 512, "caption_channels": 512, "sample_size": 16,
        },
        text_encoder={
            "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
        },
        decoder={"decoder_block_out_channels": (32, 32, 64, 64, 128, 128)},
        side=16,
    ),
    "1.6b": Size(),
}  # fmt: skip
# The image decoder of the published checkpoints.
DECODER = {
    "latent_channels": 32,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}


def make_transformer(
    size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> SanaTransformer2DModel:
    """diffusers' transformer of this size with random weights, made on the device."""
    with torch.device(device):
        return SanaTransformer2DModel(**size.transformer).to(dtype)


def make_prompts(
    size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(text ``[1, 300, channels]``, mask ``[1, 300]``) of a prompt and of the empty prompt."""
    channels = size.transformer.get("caption_channels", 2304)
    places = torch.arange(MAX_TOKENS, device=device)[None]
    return tuple(
        (torch.randn(1, MAX_TOKENS, channels, device=device).to(dtype), places < real)
        for real in (size.prompt_tokens, EMPTY_TOKENS)
    )


class Published:
    """A random text encoder (Gemma 2, in the transformer's dtype) and image decoder (float32)."""

    def __init__(self, size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import Gemma2Config, Gemma2Model

        self.size = size
        with torch.device(device):
            encoder = Gemma2Model(Gemma2Config(**size.text_encoder)).to(dtype)
            autoencoder = AutoencoderDC(**DECODER | size.decoder)
        self.encoder = encoder.eval().requires_grad_(False)
        self.decoder: nn.Module = autoencoder.decoder.eval().requires_grad_(False)
        self.tokens = torch.randint(encoder.config.vocab_size, (1, self.length), device=device)

    @property
    def length(self) -> int:
        """Tokens that the encoder reads for one prompt."""
        return INSTRUCTION_TOKENS + MAX_TOKENS

    def prompt(self) -> tuple[Tensor, int]:
        """Token ids ``[1, length]`` and how many of them are real."""
        return self.tokens, INSTRUCTION_TOKENS + self.size.prompt_tokens

    def empty(self) -> tuple[Tensor, int]:
        """The empty prompt; it has no instruction in front."""
        return self.tokens[:, :MAX_TOKENS], EMPTY_TOKENS

    @torch.no_grad()
    def encode(self, ids: Tensor, real: int) -> tuple[Tensor, Tensor]:
        """Hidden states ``[1, 300, channels]`` and their mask: the first token and the last 299."""
        mask = torch.arange(ids.shape[1], device=ids.device)[None] < real
        text = self.encoder(ids, attention_mask=mask.long()).last_hidden_state
        kept = [0, *range(ids.shape[1] - MAX_TOKENS + 1, ids.shape[1])]
        return text[:, kept], mask[:, kept]

    @torch.no_grad()
    def write_image(self, latents: Tensor) -> int:
        """Decode ``[1, C, H, W]`` in float32 and write a PNG to memory; its bytes."""
        image = self.decoder(latents.float())[0].clamp(-1, 1).add(1).mul(127.5)
        pixels = image.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
        return file.tell()
