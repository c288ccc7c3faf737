"""Kandinsky 5, its videos: a null condition that is a sentence, full attention alone."""

from typing import Any, ClassVar

import torch

from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.kandinsky5 import Kandinsky5
from mfd_fast.models.diffusers.video import Video

# What the call for videos takes where no negative prompt is given.
NULL = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, "
    "ugly, deformed, walking backwards"
)


class Kandinsky5Video(Kandinsky5, Video):
    """Text to videos with full attention."""

    rate: ClassVar = 24.0

    def __init__(self, pipe: Any, **options: Any):
        super().__init__(pipe, **options)
        if self.config.attention_type != "regular":
            raise ValueError(
                f"this network's attention is {self.config.attention_type!r}, whose masks come "
                "from the device: take a checkpoint with full attention, those of 5 seconds"
            )

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return self.encode_alone(NULL)

    def scale_factor(self) -> Any:
        return self.pipe._get_scale_factor(self.height, self.width)
