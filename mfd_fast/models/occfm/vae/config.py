"""The compressors of OccFM: what the VAEs of its configurations differ in, and a small one."""

from dataclasses import dataclass
from typing import ClassVar

from mfd_fast.settings import Count, Settings

WINDOW = 5  # side of a Swin window
SHIFT = 2  # of every other Swin block
STAGES = 2  # halvings of the grid


@dataclass(frozen=True, kw_only=True)
class VaeConfig(Settings):
    """Sizes of a VAE of occupancy grids; defaults: the one of the main model ("x16").

    ``ValueError`` names the field that does not fit.
    """

    SECTION: ClassVar[str] = "VaeConfig."

    grid: Count = 200
    """Side of the occupancy grid; a multiple of 20: windows of 5 at a quarter of it."""
    height: Count = 16
    """Voxels above each other."""
    classes: Count = 18
    """Class ids; the last one is "empty"."""
    class_width: Count = 8
    """Features of a class, in the input and in the scores."""
    latent_channels: Count = 16
    """Channels of a frame's latent."""
    width: Count = 128
    """Channels at full resolution; the encoder has twice as many at half resolution."""
    groups: Count = 32
    """Groups of every group norm of an image."""
    heads: Count = 8
    """Heads of every Swin block."""
    dense_heads: Count = 8
    """Heads of the attention over a whole latent."""
    dense_head_width: Count = 64
    """Width of one of them."""
    encoder_depths: tuple[int, int] = (2, 6)
    """Swin blocks at full and at half resolution."""
    decoder_depths: tuple[int, int] = (6, 2)
    """Swin blocks at a quarter and at half of the resolution."""
    clip: Count | None = None
    """Frames that the 3-D VAE sees together; None for the frame-by-frame VAE."""

    def __post_init__(self):
        super().__post_init__()
        if self.grid % (WINDOW << STAGES):
            raise ValueError(
                f"VaeConfig: grid must be a multiple of {WINDOW << STAGES}; got {self.grid}"
            )
        if self.width % self.groups or self.width % self.heads or self.width % 4:
            raise ValueError(
                f"VaeConfig: width must be a multiple of 4, of groups and of heads; got "
                f"{self.width}, {self.groups} and {self.heads}"
            )

    @property
    def latent_grid(self) -> int:
        """Side of a latent."""
        return self.grid >> STAGES

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one frame's latent."""
        return (self.latent_channels, self.latent_grid, self.latent_grid)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """``(X, Y, Z)`` of one frame's class ids."""
        return (self.grid, self.grid, self.height)

    @property
    def empty(self) -> int:
        """The class id of empty voxels."""
        return self.classes - 1


VAE_CONFIGS = {
    "occfm_vae": VaeConfig(),
    "occfm_vae_4c": VaeConfig(latent_channels=4),
    "occfm_vae_8c": VaeConfig(latent_channels=8),
    "occfm_vae_64c": VaeConfig(latent_channels=64),
    "occfm_3dvae": VaeConfig(clip=6),
    "tiny": VaeConfig(
        grid=40,
        height=4,
        latent_channels=4,
        width=32,
        groups=8,
        heads=4,
        dense_heads=4,
        dense_head_width=16,
        encoder_depths=(2, 2),
        decoder_depths=(2, 2),
    ),
}
"""By the name of the VAE's configuration file; ``tiny`` is no published model."""
