"""HunyuanVideo: two text encoders, masked exactly; told 1000 times its guidance, one lane."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant
from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.video import Video


class HunyuanVideo(Video):
    """cond: ``text [B, 256, C]``, ``mask [B, 256]`` and ``pooled [B, P]``."""

    targets: ClassVar = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    rate: ClassVar = 15.0
    has_null: ClassVar = False
    comfyui: ClassVar = None
    why_eager: ClassVar = "diffusers writes a mask from the host in every call"
    names: ClassVar = {
        "text": "prompt_embeds",
        "mask": "prompt_attention_mask",
        "pooled": "pooled_prompt_embeds",
    }

    def encode_text(self, prompts: list[str]) -> Cond:
        text, pooled, mask = self.pipe.encode_prompt(
            prompts, max_sequence_length=self.default("max_sequence_length")
        )
        return {"text": text, "mask": mask, "pooled": pooled}

    def blank(self, rows: int) -> Cond:
        length = self.default("max_sequence_length")
        return {
            "text": self.zeros(rows, length, self.config.text_embed_dim),
            "mask": self.zeros(rows, length),
            "pooled": self.zeros(rows, self.config.pooled_projection_dim),
        }

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("context_embedder.proj_in",))
        yield Constant("pooled", ("time_text_embed.text_embedder",))
        yield Constant(TABLE, ("rope",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            guidance=x.new_full((len(x),), float(self.scale)) * 1000.0,
            return_dict=False,
        )[0]
