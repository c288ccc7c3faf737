"""The ``cifar10`` preset and its settings."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from mfd_fast.baselines.config import (
    DERIVATIVE_SPAN,
    AyfSettings,
    ComparisonConfig,
    MeanFlowSettings,
)
from mfd_fast.distill.config import OptimConfig
from mfd_fast.run.config import RunConfig, TrainConfig
from mfd_fast.settings import Count, Settings

if TYPE_CHECKING:
    from mfd_fast.models.cifar10.task import Cifar10Task
    from mfd_fast.run.task import Shapes


@dataclass(frozen=True, kw_only=True)
class Cifar10Settings(Settings):
    """Data and yardstick of a CIFAR-10 run."""

    SECTION: ClassVar[str] = "cifar10."

    data: str = ""
    """Folder of the unpacked CIFAR-10 archive, python or binary version."""
    features: Literal["none", "inception", "dinov2"] = "none"
    """What FID, precision and recall are measured on; none: the table has speeds only."""
    features_model: str = ""
    """Inception's weights file, or a folder or hub id of DINOv2."""
    teacher_steps: Count = 100
    """Euler steps of the teacher's row (the paper: 100)."""


@dataclass(frozen=True, kw_only=True)
class Cifar10Run(RunConfig):
    """Unconditional CIFAR-10, full copies of a UNet of mfd-fast pretrain cifar10."""

    gives_samples: ClassVar[bool] = True
    PATHS: ClassVar[tuple[str, ...]] = (*RunConfig.PATHS, "cifar10.data", "cifar10.features_model")
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *RunConfig.MAY_CHANGE,
        "cifar10.features",
        "cifar10.teacher_steps",
    )

    cifar10: Cifar10Settings = field(default_factory=Cifar10Settings)
    """Data and yardstick."""

    def task(self) -> "Cifar10Task":
        from mfd_fast.models.cifar10.task import Cifar10Task

        return Cifar10Task(self)

    def shapes(self, device: str = "meta") -> "Shapes":
        from mfd_fast.models.cifar10.backbone import cifar10_shapes

        return cifar10_shapes(self, device)


# Where every value comes from, and why it is another where it is: docs/presets.md.
# Paper D.1 gives the network's size and one step; the rest is that of its OccFM runs.
OPTIM = OptimConfig(lr=2e-5, weight_decay=0.0, warmup_updates=100)
PRESETS = (
    Cifar10Run(
        preset="cifar10",
        num_eval_samples=10_000,
        distill=ComparisonConfig(
            guidance=1.0,
            step_size=0.02,
            ema_decay=0.999,
            student_optim=OPTIM,
            aux_optim=OPTIM,
            ayf=AyfSettings(derivative_span=DERIVATIVE_SPAN),
            meanflow=MeanFlowSettings(derivative_span=DERIVATIVE_SPAN),
        ),
        train=TrainConfig(updates=20_000, batch_size=128, log_every=50),
    ),
)
