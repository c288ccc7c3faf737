"""Wan 2.1 and 2.2: one text encoder, padding set to 0 and attended, linear guidance."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant, keys_values
from mfd_fast.models.diffusers.family import Cond, by_channel
from mfd_fast.models.diffusers.video import Video


class Wan(Video):
    """cond: ``text [B, 512, C]``.

    2.2 A14B has two networks: ``transformer`` where t >= boundary_ratio, ``transformer_2`` below.
    """

    hands_sigmas: ClassVar = False
    takes_sigmas: ClassVar = False
    comfyui: ClassVar = {
        **{
            f"blocks.{{}}.{theirs}_attn.{name}": (f"blocks.{{}}.{ours}.to_{own}",)
            for theirs, ours in (("self", "attn1"), ("cross", "attn2"))
            for name, own in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out.0"))
        },
        "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
        "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    }

    def __init__(self, pipe: Any, **options: Any):
        self.rate = 24.0 if pipe.config.expand_timesteps else 16.0  # that is 2.2 5B
        super().__init__(pipe, **options)
        if self.config.image_dim or self.config.in_channels != self.config.out_channels:
            raise ValueError(
                "this Wan network starts from an image, which no adapter takes: give the "
                "checkpoint of text to video (T2V or TI2V)"
            )

    @property
    def boundary(self) -> float | None:
        """The least t of the first of two networks."""
        return self.pipe.config.boundary_ratio

    @property
    def networks(self) -> dict[str, nn.Module]:
        second = {} if self.boundary is None else {"transformer_2": self.pipe.transformer_2}
        return super().networks | second

    @property
    def calls_vary(self) -> bool:
        return self.boundary is not None

    @property
    def why_eager(self) -> str:
        return "" if self.boundary is None else "times choose between two networks on the host"

    def is_first(self, t: Tensor) -> Tensor:
        if self.boundary is None or t.is_meta:
            return super().is_first(t)
        return (1000 * t >= 1000 * self.boundary).cpu()

    def encode_text(self, prompts: list[str]) -> Cond:
        text, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),  # not encode_prompt's own
        )
        return {"text": text}

    def blank(self, rows: int) -> Cond:
        length = self.default("max_sequence_length")
        return {"text": self.zeros(rows, length, self.config.text_dim)}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        text = "condition_embedder.text_embedder"
        yield Constant("text", (text,))
        yield from keys_values(transformer.blocks, "blocks", text, self.tokens)
        yield Constant(TABLE, ("rope",))

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        time = 1000 * t
        if self.pipe.config.expand_timesteps:  # 2.2 5B: a time for every token
            tokens = self.latent_frames * self.rows * self.columns
            time = time[:, None].expand(-1, tokens)
        return transformer(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=cond["text"].to(x.dtype),
            return_dict=False,
        )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        return by_channel(x, self.pipe.vae.config)
