"""Krea 2: the text of several layers is fused inside the network; v_c + s (v_c - v_u)."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import CALL, TABLE, Constant
from mfd_fast.models.diffusers.family import Cond, by_channel
from mfd_fast.models.diffusers.packed import Packed


class Krea2(Packed):
    """cond: ``text [B, L, layers, C]`` and ``mask [B, L]``."""

    comfyui: ClassVar = None
    text_length: ClassVar = 256
    names: ClassVar = {"text": "prompt_embeds", "mask": "prompt_embeds_mask"}

    @property
    def guidance(self) -> float:
        return 1.0 + max(float(self.scale), 0.0)

    @property
    def unguided(self) -> float:
        return 0.0

    def encode_text(self, prompts: list[str]) -> Cond:
        text, mask = self.pipe.encode_prompt(
            prompts, max_sequence_length=self.default("max_sequence_length")
        )
        return {"text": text, "mask": mask}

    def blank(self, rows: int) -> Cond:
        config, length = self.config, self.text_length
        text = self.zeros(rows, length, config.num_text_layers, config.text_hidden_dim)
        return {"text": text, "mask": self.zeros(rows, length, dtype=torch.bool)}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant(CALL, ("text_fusion", "txt_in"))
        yield Constant(TABLE, ("rotary_emb",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        ids = self.ids(t, cond["text"])
        return transformer(
            hidden_states=x,
            encoder_hidden_states=cond["text"],
            timestep=t,
            position_ids=torch.cat([ids["txt_ids"], ids["img_ids"]]),
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        return by_channel(self.unpacked(x), self.pipe.vae.config)[:, :, None]

    def frame(self, image: Tensor) -> Tensor:
        return image[:, :, 0]
