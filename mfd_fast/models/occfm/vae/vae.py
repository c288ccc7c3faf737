"""OccFM's VAE: occupancy grids to latents of a sixteenth of their area, and back.

A state dict has the names of a published one: ``embedding.*``, ``encoder.*``, ``decoder.*``.
Latents are the VAE's own: the world model multiplies them by ``OccfmConfig.latent_scale`` before
they meet noise, and divides its forecast by it before :meth:`OccupancyVae.decode`.

Letters in shapes: B frames, X = Y = grid, Z height, K classes, C latent channels, R = X / 4.
"""

import torch
from torch import Tensor, nn

from mfd_fast.models.occfm.vae.config import VaeConfig
from mfd_fast.models.occfm.vae.decoder import Decoder, class_scores
from mfd_fast.models.occfm.vae.encoder import Encoder, OccupancyEmbedding


class OccupancyVae(nn.Module):
    """Encoder and decoder of single frames; with ``config.clip``, of whole clips (the 3-D VAE)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.embedding = OccupancyEmbedding(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of class ids ``[B, X, Y, Z]`` (int64).

        Both are ``[B, C, R, R]``.  ``ValueError`` if the shape or the dtype of ids does not fit.
        """
        self._check_frames("ids", ids, self.config.grid_shape)
        if ids.is_floating_point():
            raise ValueError(f"OccupancyVae: ids must be class ids, integers; got {ids.dtype}")
        mean, log_variance = self.encoder(self.embedding(ids.long())).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance)

    def encode(self, ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One draw of the latents of ``ids``, ``[B, C, R, R]``: mean + deviation * noise."""
        return draw(*self.moments(ids), generator=generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Class scores ``[B, X, Y, Z, K]`` of latents ``[B, C, R, R]``; ``ValueError`` by shape.

        The class table has no gradient from here, as in the published training.
        """
        self._check_frames("latents", latents, self.config.latent_shape)
        return class_scores(self.decoder(latents), self.embedding.class_embeds.weight.detach())

    def decode_classes(self, latents: Tensor) -> Tensor:
        """The likeliest class ids, ``[B, X, Y, Z]`` int64."""
        return self.decode(latents).argmax(dim=-1)

    def forward(self, ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Scores of what :meth:`encode` keeps of ``ids``."""
        return self.decode(self.encode(ids, generator=generator))

    def _check_frames(self, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        clip = self.config.clip or 1
        if x.shape[1:] != shape or x.shape[0] % clip:
            frames = "B" if clip == 1 else f"a multiple of {clip}"
            raise ValueError(
                f"OccupancyVae: {name} must be [{frames}, {', '.join(map(str, shape))}]; "
                f"got {list(x.shape)}"
            )


def draw(mean: Tensor, deviation: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """``mean + deviation * noise``, unit noise from ``generator`` (on the device of ``mean``)."""
    eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + deviation * eps
