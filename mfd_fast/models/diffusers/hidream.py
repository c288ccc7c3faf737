"""HiDream-I1 Full: four text encoders, told 1000 t, answers -v, experts that read the device."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import CALL, Constant
from mfd_fast.models.diffusers.family import Cond, Family


class HiDream(Family):
    """cond: ``t5 [B, L, C]``, ``llama [B, layers, L, C]`` (layers first in the pipeline) and
    ``pooled [B, P]``; padding attended.
    """

    targets: ClassVar = ("to_q", "to_k", "to_v", "to_out")
    hands_sigmas: ClassVar = False
    names: ClassVar = {
        "t5": "prompt_embeds_t5",
        "llama": "prompt_embeds_llama3",
        "pooled": "pooled_prompt_embeds",
    }
    activations: ClassVar = ("none", "block")  # experts of other sizes are no recomputation
    why_eager: ClassVar = "the experts' loads are read from the device"
    why_uncompiled: ClassVar = why_eager

    def __init__(self, pipe: Any, **options: Any):
        super().__init__(pipe, **options)
        side, unit = pipe.default_sample_size * pipe.vae_scale_factor, self.unit()
        factor = side / math.sqrt(self.height * self.width)
        kept = tuple(int(n * factor // unit * unit) for n in (self.height, self.width))
        if kept != (self.height, self.width):
            raise ValueError(
                f"{type(pipe).__name__} makes images of about {side} x {side} pixels: asked for "
                f"{self.height} x {self.width} it makes {kept[0]} x {kept[1]}, so ask for that"
            )

    def encode_text(self, prompts: list[str]) -> Cond:
        t5, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        return {"t5": t5, "llama": llama.transpose(0, 1), "pooled": pooled}

    def set_modes(self, transformer: nn.Module) -> None:
        """In eval mode the experts run without gradient."""
        for module in transformer.modules():
            if type(module).__name__ == "MOEFeedForwardSwiGLU":
                module.training = True

    def blank(self, rows: int) -> Cond:
        config, length = self.config, self.default("max_sequence_length")
        t5, llama = config.caption_channels
        layers = max(config.llama_layers) + 1
        return {
            "t5": self.zeros(rows, length, t5),
            "llama": self.zeros(rows, layers, length, llama),
            "pooled": self.zeros(rows, config.text_emb_dim),
        }

    def without_values(self, transformer: nn.Module) -> None:
        """As many tokens for every expert, and the sizes of images told, not read."""
        apart = transformer.unpatchify
        sizes = (self.rows, self.columns)
        transformer.unpatchify = lambda x, _, training: apart(x, [sizes] * len(x), training)
        for module in transformer.modules():
            if type(module).__name__ == "MOEFeedForwardSwiGLU":
                module.forward = partial(_balanced, module)

    def constants(self, transformer: Any) -> Iterator[Constant]:
        for i in range(len(transformer.caption_projection)):
            yield Constant(CALL, (f"caption_projection.{i}",))
        yield Constant("pooled", ("p_embedder",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return -transformer(
            hidden_states=x,
            timesteps=1000 * t,
            encoder_hidden_states_t5=cond["t5"],
            encoder_hidden_states_llama3=cond["llama"].transpose(0, 1),
            pooled_embeds=cond["pooled"],
            return_dict=False,
        )[0]

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        given = super().call(cond, null)
        given |= {name: leaf.transpose(0, 1) for name, leaf in given.items() if "llama" in name}
        return given


def _balanced(moe: Any, x: Tensor) -> Tensor:
    """What the layer does, the first expert getting the first of the tokens."""
    weight = moe.gate(x)[1]
    tokens = x.flatten(0, -2).repeat_interleave(moe.num_activated_experts, dim=0)
    parts = tokens.chunk(len(moe.experts))
    y = torch.cat([expert(part) for expert, part in zip(moe.experts, parts, strict=True)])
    y = (y.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(dim=1)
    return y.view(x.shape) + moe.shared_experts(x)
