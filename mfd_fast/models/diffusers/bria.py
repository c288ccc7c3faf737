"""Bria 3.2: FLUX.1's layout, told 1000 t, the null condition is zeros."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant
from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.packed import Packed


class Bria(Packed):
    """cond: ``text [B, 128, C]``, 0 behind the text and attended.

    The pipeline has no LoRA loader: ``pipe.transformer.load_lora_adapter`` takes the file.
    """

    comfyui: ClassVar = None

    def unit(self) -> int:
        return self.pipe.vae_scale_factor  # which counts the packing already

    def encode_text(self, prompts: list[str]) -> Cond:
        text, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        return {"text": text}

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return {"text": torch.zeros_like(self.encode_text([""])["text"])}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("context_embedder",))
        yield Constant(TABLE, ("pos_embed",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=cond["text"],
            return_dict=False,
            **self.ids(x, cond["text"]),
        )[0]
