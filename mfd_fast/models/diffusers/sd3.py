"""Stable Diffusion 3 and 3.5: three text encoders, 1000 t, linear guidance."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import Constant
from mfd_fast.models.diffusers.family import Cond, Family


class StableDiffusion3(Family):
    """cond: ``text [B, 333, C]`` (CLIP and T5, padding attended) and ``pooled [B, P]``."""

    targets: ClassVar = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    hands_sigmas: ClassVar = False
    text_length: ClassVar = 77 + 256
    names: ClassVar = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}

    def encode_text(self, prompts: list[str]) -> Cond:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        return {"text": text, "pooled": pooled}

    def blank(self, rows: int) -> Cond:
        pooled = self.zeros(rows, self.config.pooled_projection_dim)
        return super().blank(rows) | {"pooled": pooled}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("context_embedder",))
        yield Constant("pooled", ("time_text_embed.text_embedder",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]
