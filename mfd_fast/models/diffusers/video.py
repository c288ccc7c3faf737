"""What the families of videos share: frames, latents with frames, and how they are decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from mfd_fast.models.diffusers.family import Cond, Family


class Video(Family):
    """A pipeline of videos at one size, number of frames and rate.

    Args:
        frames: of a video; the default of the pipeline's call if None.
        fps: frames a second of what is written, and what the network is told where it is told; the
            published model's if None.

    ``ValueError`` for frames that the latents cannot have.
    """

    output: ClassVar[str] = "frames"
    frames_name: ClassVar[str] = "num_frames"
    """The argument of the pipeline's call that is the number of frames."""
    rate: ClassVar[float] = 16.0
    """Frames a second of the published model's videos."""

    def __init__(
        self, pipe: Any, *, frames: int | None = None, fps: float | None = None, **options: Any
    ):
        super().__init__(pipe, **options)
        self.frames = frames or self.default(self.frames_name)
        self.fps = fps or self.rate
        group = self.group()
        if self.frames % group != 1 % group:
            raise ValueError(
                f"frames must be 1 more than a multiple of {group} for {type(pipe).__name__}; got "
                f"{self.frames}"
            )
        self.latent_frames = (self.frames - 1) // group + 1
        self.extra = type(self).extra | {self.frames_name: self.frames}

    def default_size(self) -> tuple[int, int]:
        return self.default("height"), self.default("width")

    def unit(self) -> int:
        return self.pipe.vae_scale_factor_spatial * self.patch

    def group(self) -> int:
        """Frames of one latent frame, behind the first."""
        return self.pipe.vae_scale_factor_temporal

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the network takes it: ``[C, frames, h, w]``."""
        size = self.rows * self.patch, self.columns * self.patch
        return self.config.in_channels, self.latent_frames, *size

    @property
    def tokens(self) -> tuple[int, int]:
        text, frame = super().tokens
        return text, self.latent_frames * frame

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Videos ``[B, frames, 3, height, width]`` in [0, 1] of samples at t = 0."""
        made = self.decoded(self.denormalised(x).to(self.pipe.vae.dtype))
        return self.pipe.video_processor.postprocess_video(made, output_type="pt")

    def decoded(self, x: Tensor) -> Tensor:
        """What the VAE makes of denormalised latents, ``[B, 3, frames, height, width]``."""
        return self.pipe.vae.decode(x, return_dict=False)[0]


class MaskedText(Video):
    """A pipeline whose text is ``text [B, L, C]`` with a ``mask [B, L]``."""

    names: ClassVar[dict[str, str]] = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}

    def encode_text(self, prompts: list[str]) -> Cond:
        text, mask, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        return {"text": text, "mask": mask}


@contextmanager
def in_tiles(vae: Any) -> Iterator[None]:
    """Inside the block the VAE decodes what is larger than its tile by overlapping tiles."""
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
