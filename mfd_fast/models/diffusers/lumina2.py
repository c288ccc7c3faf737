"""Lumina-Image 2: told 1 - t, answers -v; guidance keeps the length of every row of pixels."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.family import Cond, Family


class Lumina2(Family):
    """cond: ``text [B, 256, C]`` and ``mask [B, 256]``: padding is dropped, rows share a batch.

    The null prompt is "" without the system prompt.
    """

    names: ClassVar = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    reads_device: ClassVar = "the lengths of the prompts are read from the device"

    def encode_text(self, prompts: list[str]) -> Cond:
        return self._encoded(prompts, is_guided=False)[0]

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return self._encoded([""], is_guided=True)[1]

    def _encoded(self, prompts: list[str], *, is_guided: bool) -> list[Cond]:
        made = self.pipe.encode_prompt(
            prompts, is_guided, max_sequence_length=self.default("max_sequence_length")
        )
        return [{"text": made[i], "mask": made[i + 1]} for i in (0, 2)]

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return -transformer(
            hidden_states=x,
            timestep=1 - t,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]

    def combine(self, v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """Linear guidance with the norm of v_cond in every row of pixels ``[..., w]``."""
        v = v_uncond + scale * (v_cond - v_uncond)
        return v * (v_cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))
