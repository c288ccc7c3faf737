"""The ``occfm`` presets and their settings."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.distill.config import OptimConfig
from mfd_fast.run.config import RunConfig, TrainConfig
from mfd_fast.settings import CountOrOff, Positive, Settings

if TYPE_CHECKING:
    from mfd_fast.models.occfm.task import OccfmTask
    from mfd_fast.run.task import Shapes


@dataclass(frozen=True, kw_only=True)
class OccfmSettings(Settings):
    """Data, decoder and what is trained of an OccFM run."""

    SECTION: ClassVar[str] = "occfm."

    store: str = ""
    """Store of latents and labels, from mfd-fast prepare occfm."""
    vae: str = ""
    """File of the VAE that made the latents; empty: the one inside the teacher's checkpoint."""
    vae3d: str = ""
    """File of a VAE of clips: the table gets FID and FVD on its features; empty: it does not."""
    rank: CountOrOff = 0
    """Rank of the auxiliary's and the student's LoRA; 0: full copies of the network (the paper)."""
    alpha: Positive = 64.0
    """LoRA alpha; the adapter's output is scaled by alpha / rank."""
    targets: str = "qkv,attn.proj,fc1,fc2,to_qkv,to_out"
    """Linear layers that get an adapter, by the end of their names."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the products; trained weights are float32 (float16 needs distill.loss_scale)."""


@dataclass(frozen=True, kw_only=True)
class OccfmRun(RunConfig):
    """OccFM occupancy forecasting, full copies of the transition network or adapters on it."""

    SHORT: ClassVar[dict[str, str]] = {"--data": "--occfm.store", "--vae": "--occfm.vae"}
    PATHS: ClassVar[tuple[str, ...]] = (*RunConfig.PATHS, "occfm.store", "occfm.vae", "occfm.vae3d")

    occfm: OccfmSettings = field(default_factory=OccfmSettings)
    """Data, decoder and what is trained."""

    def task(self) -> "OccfmTask":
        from mfd_fast.models.occfm.task import OccfmTask

        return OccfmTask(self)

    def shapes(self, device: str = "meta") -> "Shapes":
        from mfd_fast.models.occfm.backbone import occfm_shapes

        return occfm_shapes(self, device)


# Where every value comes from, and why it is another where it is: docs/presets.md.
# Paper, A.3.1: h = .02, logit-normal times (N(0, 1), as the teacher was trained: the paper gives no
# parameters), Adam, 100-step warm-up, clip 1, 30 epochs of 28,130 frames at 8 a step.  Its text
# names no learning rate: a quarter of the one that the published teacher was trained with on one
# GPU.
OPTIM = OptimConfig(lr=2e-5, weight_decay=0.0, warmup_updates=100)
PAPER = ComparisonConfig(guidance=2.0, step_size=0.02, student_optim=OPTIM, aux_optim=OPTIM)
# The paper's scale is 10, where the difference of the mean velocities is divided by the 8 x 240,000
# numbers of a batch: 5e-6, below the 6e-5 from which float16 has its full precision.  And it grows
# by 2 in 2,000 updates, so that the student would end at 160.  A scale changes rounding alone.
LOSS_SCALE = 65536.0
CYCLES = 30 * 28_130 // 8 // 11

PRESETS = (
    OccfmRun(
        preset="occfm",
        num_eval_samples=4369,
        distill=replace(PAPER, loss_scale=LOSS_SCALE),
        train=TrainConfig(updates=CYCLES, batch_size=8),
        occfm=OccfmSettings(dtype="float16"),
    ),
    OccfmRun(
        preset="occfm-tiny",
        num_eval_samples=4,
        distill=replace(PAPER, step_size=0.2, aux_updates=2),
        train=TrainConfig(updates=2, batch_size=2, log_every=1),
    ),
)
