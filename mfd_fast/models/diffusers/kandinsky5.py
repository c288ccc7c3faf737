"""Kandinsky 5, its images: channels last, text and null as long as they are, attended."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.lengths import OwnLengths


class Kandinsky5(OwnLengths):
    """cond: ``text [B, L, C]``, ``length [B]`` and ``pooled [B, P]``; samples ``[F, h, w, C]``.

    Its own scheduler shifts twice and its call takes no sigmas: a student has UniPC of order 1.
    """

    targets: ClassVar = ("to_query", "to_key", "to_value")
    hands_sigmas: ClassVar = False
    takes_sigmas: ClassVar = False
    comfyui: ClassVar = None
    text_length: ClassVar = 256
    names: ClassVar = {"text": "prompt_embeds_qwen", "pooled": "prompt_embeds_clip"}

    def unit(self) -> int:
        return self.pipe.vae_scale_factor_spatial * self.patch

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the network takes it: ``[frames, h, w, C]``."""
        size = self.rows * self.patch, self.columns * self.patch
        return self.latent_frames, *size, self.config.in_visual_dim

    def even_scheduler(self) -> Any:
        import diffusers

        own = self.pipe.scheduler
        if "solver_order" in own.config:
            return own
        return diffusers.UniPCMultistepScheduler(
            **{"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            flow_shift=own.config.shift,
            num_train_timesteps=own.config.num_train_timesteps,
        )

    def encode_alone(self, prompt: str) -> Cond:
        text, pooled, _ = self.pipe.encode_prompt(
            [prompt],
            max_sequence_length=self.default("max_sequence_length"),
            dtype=self.pipe.transformer.dtype,
        )
        return {"text": text, "length": torch.tensor([text.shape[1]]), "pooled": pooled}

    def blank_text(self, rows: int, length: int) -> Cond:
        text = self.zeros(rows, length, self.config.in_text_dim)
        pooled = self.zeros(rows, self.config.in_text_dim2)
        return {"text": text, "length": torch.tensor([length] * rows), "pooled": pooled}

    def cast(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        super().cast(transformer, dtype)
        for name, module in transformer.named_modules():
            if name.rpartition(".")[2] in transformer._keep_in_fp32_modules:
                module.float()

    def call(self, cond: Cond, null: Cond | None) -> dict[str, Any]:
        ends = {}
        for sign, row in {"": cond, "negative_": null}.items():
            if row is not None:
                lengths = torch.cat([row["length"].new_zeros(1), row["length"]])
                ends[f"{sign}prompt_cu_seqlens"] = lengths.cumsum(0).int()
        return super().call(cond, null) | ends

    def scale_factor(self) -> Any:
        """What positions are divided by."""
        return [1.0, 1.0, 1.0]

    def velocity_alone(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text = cond["text"].to(x.dtype)
        sides = self.latent_frames, self.rows, self.columns
        return transformer(
            hidden_states=self.pipe_latents(x),
            encoder_hidden_states=text,
            pooled_projections=cond["pooled"].to(x.dtype),
            timestep=1000 * t,
            visual_rope_pos=[torch.arange(side, device=x.device) for side in sides],
            text_rope_pos=torch.arange(text.shape[1], device=x.device),
            scale_factor=self.scale_factor(),
            return_dict=True,
        ).sample

    def pipe_latents(self, x: Tensor) -> Tensor:
        """With zeros for the first frame and its mask, where the network takes them."""
        if not self.config.visual_cond:
            return x
        return torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[..., :1])], dim=-1)

    def denormalised(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) / self.pipe.vae.config.scaling_factor


class Kandinsky5Image(Kandinsky5):
    """Text to images, in the sizes of its pipeline alone."""

    output: ClassVar = "image"
    latent_frames: ClassVar = 1

    def __init__(self, pipe: Any, **options: Any):
        super().__init__(pipe, **options)
        if (self.width, self.height) not in pipe.resolutions:
            sizes = ", ".join(f"{height}x{width}" for width, height in pipe.resolutions)
            raise ValueError(
                f"height x width must be one of {sizes} for {type(pipe).__name__}, which would "
                f"change {self.height}x{self.width}"
            )

    def denormalised(self, x: Tensor) -> Tensor:
        return super().denormalised(x)[:, :, 0]
