"""What the families with FLUX.1's layout share: 2 x 2 latent pixels are one token."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfd_fast.models.diffusers.family import Family


class Packed(Family):
    """Samples are ``[tokens, 4 C]``, in the channel order (c, dy, dx)."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.rows * self.columns, self.config.in_channels

    @cached_property
    def image_ids(self) -> Tensor:
        """(0, row, column) of every token, ``[tokens, 3]``."""
        ids = torch.zeros(self.rows, self.columns, 3)
        ids[..., 1] = torch.arange(self.rows)[:, None]
        ids[..., 2] = torch.arange(self.columns)
        return ids.flatten(0, 1)

    def ids(self, x: Tensor, text: Tensor) -> dict[str, Any]:
        """Positions of text and image, without batch; like x in dtype and device."""
        image = self.image_ids = self.image_ids.to(x)  # moved once, never inside a captured call
        return {"txt_ids": image.new_zeros(text.shape[1], 3), "img_ids": image}

    def unpacked(self, x: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` of samples ``[B, tokens, 4 C]``."""
        pixels = x.unflatten(1, (self.rows, self.columns)).unflatten(3, (-1, 2, 2))
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def denormalised(self, x: Tensor) -> Tensor:
        return super().denormalised(self.unpacked(x))
