"""The world models of OccFM: what their transition networks differ in, and a small one for tests.

Source: arXiv 2506.23434.  "x4", "x8", "x16" and "x64" count the channels of a latent; its spatial
size is the same in all of them.
"""

from dataclasses import dataclass
from typing import ClassVar

from mfd_fast.models.occfm.embeddings import MAX_FRAMES
from mfd_fast.settings import Count, CountOrOff, Number, Positive, Settings


@dataclass(frozen=True, kw_only=True)
class OccfmConfig(Settings):
    """Sizes of a transition network and of the windows it sees; defaults: the main model.

    ``ValueError`` names the field that does not fit.
    """

    SECTION: ClassVar[str] = "OccfmConfig."

    latent_channels: Count = 16
    """Channels of one frame's latent."""
    grid: Count = 50
    """Side of one frame's latent; even, for it is halved once."""
    history_last: CountOrOff = 4
    """How many of the history frames are real; the first ones of the others are zeros."""
    trajectory_length: Count = 6
    """How many of a window's ego steps condition the network: 6 (history) or 12 (all)."""
    frames: Count = 12
    """Frames of a window; the first half is history, the second is forecast."""
    base_width: Count = 64
    """Channels after the first convolution."""
    level_multipliers: tuple[int, int] = (2, 4)
    """Channels of the two levels, in base widths."""
    condition_width: Count = 128
    """Channels of the embeddings of time and trajectory."""
    heads: Count = 8
    """Heads of every attention."""
    head_width: Count = 32
    """Width of a head where the channels do not decide it: the attentions outside DiT blocks."""
    first_kernel: Count = 7
    """Side of the first convolution's window."""
    trajectory_frequencies: Count = 8
    """Fourier frequencies of one coordinate of an ego step."""
    latent_scale: Positive = 10.0
    """What latents are multiplied by before they meet unit noise."""
    guidance: Number = 2.0
    """Scale of the model's own classifier-free guidance."""
    sample_steps: Count = 10
    """Euler steps of the model's own sampler."""
    sample_shift: Positive = 3.0
    """Shift of its times towards noise (``flow.shifted_schedule``)."""

    def __post_init__(self):
        super().__post_init__()
        if self.grid % 2 or self.frames % 2 or self.heads % 2:
            raise ValueError(
                "OccfmConfig: grid, frames and heads must be even; got "
                f"{self.grid}, {self.frames} and {self.heads}"
            )
        if self.frames > MAX_FRAMES:
            raise ValueError(
                f"OccfmConfig: frames must be at most {MAX_FRAMES}, for farther frames would share "
                f"rows of the bias table; got {self.frames}"
            )
        if any(width % (4 * self.heads) for width in self.widths[1:]):
            raise ValueError(
                f"OccfmConfig: both levels' widths {list(self.widths[1:])} must be multiples of "
                f"4 heads = {4 * self.heads}"
            )
        if self.base_width % self.heads or self.condition_width % 2:
            raise ValueError(
                f"OccfmConfig: base_width must be a multiple of heads = {self.heads} and "
                f"condition_width even; got {self.base_width} and {self.condition_width}"
            )
        if not 0 <= self.history_last <= self.history or not (
            1 <= self.trajectory_length <= self.frames
        ):
            raise ValueError(
                f"OccfmConfig: history_last must be 0 to {self.history} and trajectory_length 1 to "
                f"{self.frames}; got {self.history_last} and {self.trajectory_length}"
            )

    @property
    def history(self) -> int:
        """Frames that are given."""
        return self.frames // 2

    @property
    def future(self) -> int:
        """Frames that are forecast."""
        return self.frames - self.history

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels after the first convolution, on the first level and on the second."""
        return (self.base_width, *(m * self.base_width for m in self.level_multipliers))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one frame."""
        return (self.latent_channels, self.grid, self.grid)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """``(frames, C, H, W)`` of one forecast: what is noise and becomes latents."""
        return (self.future, *self.latent_shape)


CONFIGS = {
    "occfm": OccfmConfig(),
    "occfm_fut": OccfmConfig(trajectory_length=12),
    "occfm_4c": OccfmConfig(latent_channels=4, history_last=6),
    "occfm_8c": OccfmConfig(latent_channels=8, history_last=6),
    "occfm_64c": OccfmConfig(latent_channels=64, history_last=6),
    "tiny": OccfmConfig(
        latent_channels=4,
        grid=10,
        base_width=16,
        condition_width=32,
        head_width=8,
    ),
}
"""By the name of the model's configuration file; ``tiny`` is no published model."""
