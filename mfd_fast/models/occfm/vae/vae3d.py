"""The 3-D VAE of OccFM, whose latents are the features of its FID and FVD.

It is the VAE of ``vae`` with a block over the six frames of a clip after each halving of the grid
and before the decoder's first doubling; the frames of a clip lie next to each other in the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mfd_fast.models.occfm.vae.config import VaeConfig
from mfd_fast.models.occfm.vae.vae import OccupancyVae

POOLED = 5  # side of a frame's feature map


class OccupancyVae3d(OccupancyVae):
    """An :class:`OccupancyVae` of clips; ``ValueError`` if ``config.clip`` is None."""

    def __init__(self, config: VaeConfig):
        if config.clip is None:
            raise ValueError("OccupancyVae3d: config.clip must be the frames of a clip; got None")
        super().__init__(config)

    @torch.no_grad()
    def features(self, ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One feature vector of every clip: a draw of its latents, pooled to 5 x 5, flattened.

        Args:
            ids: class ids ``[N, clip, X, Y, Z]``.
            generator: of the draw; the published metric draws, it does not take the mean.

        Returns:
            ``[N, clip C 25]``, 2,400 wide for the published model, frame by frame.
        """
        if ids.ndim != 5 or ids.shape[1] != self.config.clip:
            raise ValueError(
                f"OccupancyVae3d: ids must be [N, {self.config.clip}, "
                f"{', '.join(map(str, self.config.grid_shape))}]; got {list(ids.shape)}"
            )
        latents = self.encode(ids.flatten(0, 1), generator=generator)
        return F.adaptive_avg_pool2d(latents, POOLED).reshape(len(ids), -1)
