"""FLUX.2: dev is told its guidance (one lane), the klein base checkpoints are guided linearly."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant
from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.packed import Packed


class Flux2(Packed):
    """cond: ``text [B, 512, C]``, three layers side by side, padding attended.

    Latents are ``[B, 128, H / 16, W / 16]``, normalised by the VAE's batch norm.
    """

    targets: ClassVar = (
        r"transformer\.(transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))"
    )
    comfyui: ClassVar = {
        **{
            f"double_blocks.{{}}.{side}_attn.qkv": tuple(
                f"transformer_blocks.{{}}.attn.{name}" for name in names
            )
            for side, names in {
                "img": ("to_q", "to_k", "to_v"),
                "txt": ("add_q_proj", "add_k_proj", "add_v_proj"),
            }.items()
        },
        "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
        "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
        "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
    }
    has_null: ClassVar = False

    def encode_text(self, prompts: list[str]) -> Cond:
        text, _ = self.pipe.encode_prompt(
            prompts, max_sequence_length=self.default("max_sequence_length")
        )
        return {"text": text}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant("text", ("context_embedder",))
        yield Constant(TABLE, ("pos_embed",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=t,
            guidance=self.told(t),
            encoder_hidden_states=cond["text"],
            return_dict=False,
            **self.ids(x, cond["text"]),
        )[0]

    def told(self, t: Tensor) -> Tensor | None:
        """The guidance that the network is told, ``[R]``."""
        return t.new_full(t.shape, self.scale)

    def ids(self, x: Tensor, text: Tensor) -> dict[str, Any]:
        """(0, row, column, 0) of the image, (0, 0, 0, index) of the text."""
        image = self.image_ids = self.image_ids.to(x.device)
        index = torch.arange(text.shape[1], device=x.device)
        return {
            "txt_ids": nn.functional.pad(index[:, None], (3, 0)),
            "img_ids": nn.functional.pad(image.long(), (0, 1)),
        }

    def pipe_latents(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (self.rows, self.columns))

    def denormalised(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).to(x)
        return self.unpacked(x * std + vae.bn.running_mean.to(x))


class Flux2Klein(Flux2):
    """The base checkpoints; cond as :class:`Flux2`, the null prompt is ""."""

    has_null: ClassVar = True

    def told(self, t: Tensor) -> None:
        return None
