"""AuraFlow: one text encoder, padding set to 0 and attended, linear guidance."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import Constant
from mfd_fast.models.diffusers.family import Cond, Family


class AuraFlow(Family):
    """cond: ``text [B, 256, C]``."""

    targets: ClassVar = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    hands_sigmas: ClassVar = False

    def encode_text(self, prompts: list[str]) -> Cond:
        text, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        return {"text": text}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("context_embedder",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(x, encoder_hidden_states=cond["text"], timestep=t, return_dict=False)[0]

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        ones = cond["text"].new_ones(cond["text"].shape[:2])  # asked for, and not used
        masks = {"prompt_attention_mask": ones}
        masks |= {} if null is None else {"negative_prompt_attention_mask": ones}
        return super().call(cond, null) | masks
