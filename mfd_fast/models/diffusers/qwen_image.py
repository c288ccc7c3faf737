"""Qwen-Image: guidance keeps the length of every token's conditional velocity."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant
from mfd_fast.models.diffusers.family import Cond, by_channel, padded
from mfd_fast.models.diffusers.packed import Packed
from mfd_fast.ops.reference import renormalised


class QwenImage(Packed):
    """cond: ``text [B, L, C]`` and ``mask [B, L]``, masked exactly: rows of all lengths share a
    batch.

    Without a negative prompt the pipeline ignores its scale; the null prompt is " ", by custom.
    """

    scale_name: ClassVar = "true_cfg_scale"
    why_eager: ClassVar = "diffusers makes a tensor on the host in every call"
    text_length: ClassVar = 256
    combine: ClassVar = staticmethod(renormalised)  # of every token
    names: ClassVar = {"text": "prompt_embeds", "mask": "prompt_embeds_mask"}

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return self._encoded([" "])

    def encode_text(self, prompts: list[str]) -> Cond:
        self.null_row = self.encode_null() if self.null_row is None else self.null_row
        cond = self._encoded(prompts)
        length = max(cond["mask"].shape[1], self.null_row["mask"].shape[1])
        return {name: padded(leaf, length) for name, leaf in cond.items()}

    def _encoded(self, prompts: list[str]) -> Cond:
        text, mask = self.pipe.encode_prompt(
            prompts, max_sequence_length=self.default("max_sequence_length")
        )
        mask = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return {"text": text, "mask": mask}

    def blank(self, rows: int) -> Cond:
        cond = super().blank(rows)
        return cond | {"mask": self.zeros(*cond["text"].shape[:2], dtype=torch.bool)}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("txt_norm", "txt_in"))
        yield Constant(TABLE, ("pos_embed",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=cond["text"],
            encoder_hidden_states_mask=cond["mask"],
            img_shapes=[[(1, self.rows, self.columns)]] * len(x),
            return_dict=False,
        )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        return by_channel(self.unpacked(x), self.pipe.vae.config)[:, :, None]

    def frame(self, image: Tensor) -> Tensor:
        return image[:, :, 0]
