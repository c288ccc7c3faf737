"""Lumina-Image 2: told 1 - t, answers -v; guidance keeps the length of every row of pixels."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import CALL, Constant
from mfd_fast.models.diffusers.family import Cond, Family
from mfd_fast.ops.reference import renormalised


class AllTrue(Tensor):
    """A mask whose sums and true places are known without its values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nonzero:
            return torch.arange(args[0].numel(), device=args[0].device)[:, None]
        out = super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.sum:
            return torch.full(out.shape, args[0].shape[-1])
        if isinstance(out, AllTrue) and out.dtype != torch.bool:
            return out.as_subclass(Tensor)
        return out


class Lumina2(Family):
    """cond: ``text [B, 256, C]`` and ``mask [B, 256]``: padding is dropped, rows share a batch.

    The null prompt is "" without the system prompt.
    """

    combine: ClassVar = staticmethod(renormalised)  # of every row of pixels
    names: ClassVar = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    comfyui: ClassVar = {
        f"{stack}.{{}}.{theirs}": tuple(f"{stack}.{{}}.{name}" for name in ours)
        for stack in ("layers", "noise_refiner", "context_refiner")
        for theirs, ours in {
            "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attention.out": ("attn.to_out.0",),
            **{f"feed_forward.w{n}": (f"feed_forward.linear_{n}",) for n in (1, 2, 3)},
            "adaLN_modulation.1": ("norm1.linear",),
        }.items()
    }
    why_eager: ClassVar = "the lengths of the prompts are read from the device"

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

    def blank(self, rows: int) -> Cond:
        length = self.default("max_sequence_length")
        mask = self.zeros(rows, length, dtype=torch.bool).as_subclass(AllTrue)
        return {"text": self.zeros(rows, length, self.config.cap_feat_dim), "mask": mask}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        refiners = (f"context_refiner.{i}" for i in range(len(transformer.context_refiner)))
        yield Constant(CALL, ("time_caption_embed.caption_embedder", *refiners))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return -transformer(
            hidden_states=x,
            timestep=1 - t,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]
