"""FLUX.1: dev is told its guidance (one lane), schnell has none."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant
from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.packed import Packed


class Flux1(Packed):
    """cond: ``text [B, 512, C]`` (T5, padding attended) and ``pooled [B, P]`` (CLIP)."""

    targets: ClassVar = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    has_null: ClassVar = False
    names: ClassVar = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}

    def encode_text(self, prompts: list[str]) -> Cond:
        text, pooled, _ = self.pipe.encode_prompt(
            prompts, None, max_sequence_length=self.default("max_sequence_length")
        )
        return {"text": text, "pooled": pooled}

    def blank(self, rows: int) -> Cond:
        pooled = self.zeros(rows, self.config.pooled_projection_dim)
        return super().blank(rows) | {"pooled": pooled}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("context_embedder",))
        yield Constant("pooled", ("time_text_embed.text_embedder",))
        yield Constant(TABLE, ("pos_embed",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        guidance: dict[str, Any] = {}
        if self.config.guidance_embeds:
            guidance = {"guidance": t.new_full(t.shape, self.scale)}
        return transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            return_dict=False,
            **self.ids(x, cond["text"]),
            **guidance,
        )[0]
