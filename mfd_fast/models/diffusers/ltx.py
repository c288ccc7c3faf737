"""LTX-Video: tokens of one latent pixel, told the frame rate by its positions."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import Constant, keys_values
from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.video import MaskedText


class LTX(MaskedText):
    """cond: ``text [B, 128, C]`` and ``mask [B, 128]``, masked exactly."""

    patch: ClassVar = 1
    comfyui: ClassVar = {
        name: (name,)
        for name in (
            f"transformer_blocks.{{}}.{attention}.{layer}"
            for attention in ("attn1", "attn2")
            for layer in ("to_q", "to_k", "to_v", "to_out.0")
        )
    }

    def __init__(self, pipe: Any, **options: Any):
        super().__init__(pipe, **options)
        self.fps = options.get("fps") or self.default("frame_rate")
        self.extra = self.extra | {"frame_rate": self.fps}
        if self.config.patch_size != 1 or self.config.patch_size_t != 1:
            raise ValueError("LTX networks have patches of one latent pixel; this one's are larger")

    def unit(self) -> int:
        return self.pipe.vae_spatial_compression_ratio

    def group(self) -> int:
        return self.pipe.vae_temporal_compression_ratio

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``[frames x h x w, C]``."""
        return self.latent_frames * self.rows * self.columns, self.config.in_channels

    def blank(self, rows: int) -> Cond:
        text = self.zeros(rows, self.default("max_sequence_length"), self.config.caption_channels)
        return {"text": text, "mask": text.new_zeros(text.shape[:2], dtype=torch.bool)}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        stack, text = "transformer_blocks", "caption_projection"
        yield Constant("text", (text,))
        yield from keys_values(transformer.get_submodule(stack), stack, text, self.tokens)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        unit = self.unit()
        return transformer(
            hidden_states=x,
            encoder_hidden_states=cond["text"].to(x.dtype),
            timestep=1000 * t,
            encoder_attention_mask=cond["mask"],
            num_frames=self.latent_frames,
            height=self.rows,
            width=self.columns,
            rope_interpolation_scale=(self.group() / self.fps, unit, unit),
            return_dict=False,
        )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        x = x.unflatten(1, (self.latent_frames, self.rows, self.columns)).movedim(-1, 1)
        mean, std = (y.view(1, -1, 1, 1, 1).to(x) for y in (vae.latents_mean, vae.latents_std))
        return x * std / vae.config.scaling_factor + mean

    def decoded(self, x: Tensor) -> Tensor:
        """At the decode_timestep 0 of the pipeline's call, where its VAE is told one."""
        vae = self.pipe.vae
        time = x.new_zeros(len(x)) if vae.config.timestep_conditioning else None
        return vae.decode(x, time, return_dict=False)[0]
