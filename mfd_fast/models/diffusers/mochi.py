"""Mochi: told 1000 (1 - t), answers -v, text of every row cut to its length."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import CALL, TABLE, Constant
from mfd_fast.models.diffusers.family import Cond, by_channel
from mfd_fast.models.diffusers.lumina2 import AllTrue
from mfd_fast.models.diffusers.record import replaced
from mfd_fast.models.diffusers.video import MaskedText


class Mochi(MaskedText):
    """cond: ``text [B, 256, C]`` and ``mask [B, 256]``: padding is dropped, rows share a batch.

    Its schedule divides by zero for a single step: a student has two or more.
    """

    rate: ClassVar = 30.0
    comfyui: ClassVar = None
    least_steps: ClassVar = 2
    why_eager: ClassVar = "the lengths of the prompts are read from the device"

    def unit(self) -> int:
        return self.pipe.vae_spatial_scale_factor * self.patch

    def group(self) -> int:
        return self.pipe.vae_temporal_scale_factor

    def default_size(self) -> tuple[int, int]:
        return self.pipe.default_height, self.pipe.default_width

    def blank(self, rows: int) -> Cond:
        text = self.zeros(rows, self.default("max_sequence_length"), self.config.text_embed_dim)
        mask = text.new_zeros(text.shape[:2], dtype=torch.bool)
        return {"text": text, "mask": mask.as_subclass(AllTrue)}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("time_embed.caption_proj",))
        yield Constant(CALL, ("time_embed.pooler",))
        yield Constant(TABLE, ("rope",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # Its positions are made in an autocast of the device, and "meta" has none.
        block = replaced(torch, "autocast", lambda *_: nullcontext())
        with block if x.is_meta else nullcontext():
            return -transformer(
                hidden_states=x,
                encoder_hidden_states=cond["text"].to(x.dtype),
                timestep=1000 * (1 - t),
                encoder_attention_mask=cond["mask"],
                return_dict=False,
            )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        config = self.pipe.vae.config
        x = x / config.scaling_factor
        return by_channel(x, config) if config.latents_mean else x
