"""SANA through diffusers' class; the fused network of ``models/sana`` is the fast path."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import Constant, keys_values
from mfd_fast.models.diffusers.family import Cond, Family


class Sana(Family):
    """cond: ``text [B, 300, C]`` and ``mask [B, 300]``, masked exactly.

    The null prompt is "" without the instruction.
    """

    targets: ClassVar = ("to_q", "to_k", "to_v")
    comfyui: ClassVar = None  # the preset sana-1.6b writes that file
    names: ClassVar = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    extra: ClassVar = {"use_resolution_binning": False}

    def unit(self) -> int:
        return self.pipe.vae_scale_factor * self.config.patch_size

    @property
    def sample_shape(self) -> tuple[int, ...]:
        patch = self.config.patch_size
        return self.config.in_channels, self.rows * patch, self.columns * patch

    def encode_text(self, prompts: list[str]) -> Cond:
        return self._encoded(prompts, self.default("complex_human_instruction"))

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return self._encoded([""], None)

    def _encoded(self, prompts: list[str], instruction: Any) -> Cond:
        text, mask, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
            complex_human_instruction=instruction,
        )
        return {"text": text, "mask": mask}

    def blank(self, rows: int) -> Cond:
        text = self.zeros(rows, self.default("max_sequence_length"), self.config.caption_channels)
        return {"text": text, "mask": text.new_zeros(text.shape[:2], dtype=torch.bool)}

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        return super().call(cond, null) | {"negative_prompt": None}  # "" by default

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("caption_projection", "caption_norm"))
        stack = "transformer_blocks"
        yield from keys_values(transformer.get_submodule(stack), stack, "caption_norm", self.tokens)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        v = transformer(
            x,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"],
            timestep=1000 * t * self.config.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        return v[:, : x.shape[1]]  # a network that learns a variance too puts it behind
