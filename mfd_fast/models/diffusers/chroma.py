"""Chroma: FLUX.1's layout without pooled text; its mask is a float that is added to the logits."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant
from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.packed import Packed


class Chroma(Packed):
    """cond: ``text [B, 512, C]`` and ``mask [B, 512]``, 1.0 for text and one token of padding.

    As the pipeline hands it over, the mask adds 0 or 1 and masks nothing; the teacher is the
    pipeline, so it does here too.
    """

    why_eager: ClassVar = "diffusers makes a tensor on the host in every call"
    names: ClassVar = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}

    def encode_text(self, prompts: list[str]) -> Cond:
        text, _, mask, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        return {"text": text, "mask": mask}

    def blank(self, rows: int) -> Cond:
        cond = super().blank(rows)
        return cond | {"mask": self.zeros(*cond["text"].shape[:2])}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("context_embedder",))
        yield Constant(TABLE, ("pos_embed",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mask = cond["mask"]
        return transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=cond["text"],
            attention_mask=torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1),
            return_dict=False,
            **self.ids(x, cond["text"]),
        )[0]
