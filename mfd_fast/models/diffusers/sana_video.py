"""SANA-Video: SANA's text and call, with frames."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from mfd_fast.models.diffusers.constants import TABLE, Constant
from mfd_fast.models.diffusers.family import by_channel
from mfd_fast.models.diffusers.sana import Sana
from mfd_fast.models.diffusers.video import Video


class SanaVideo(Video, Sana):
    """cond: ``text [B, 300, C]`` and ``mask [B, 300]``, masked exactly."""

    frames_name: ClassVar = "frames"

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield from super().constants(transformer)
        yield Constant(TABLE, ("rope",))

    def denormalised(self, x: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return by_channel(x, config) if hasattr(config, "latents_mean") else x
