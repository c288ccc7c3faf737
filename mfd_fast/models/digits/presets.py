"""The ``digits`` preset."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mfd_fast.baselines.config import (
    DERIVATIVE_SPAN,
    AyfSettings,
    ComparisonConfig,
    MeanFlowSettings,
)
from mfd_fast.distill.config import OptimConfig
from mfd_fast.run.config import RunConfig, TrainConfig

if TYPE_CHECKING:
    from mfd_fast.models.digits.task import DigitsTask


@dataclass(frozen=True, kw_only=True)
class DigitsRun(RunConfig):
    """8x8 digits from the packaged class-conditional teacher."""

    gives_samples: ClassVar[bool] = True

    def task(self) -> "DigitsTask":
        from mfd_fast.models.digits.task import DigitsTask

        return DigitsTask(self)


# Where every value comes from, and why it is another where it is: docs/presets.md.
PRESETS = (
    DigitsRun(
        preset="digits",
        distill=ComparisonConfig(
            guidance=2.0,
            step_size=0.05,
            aux_updates=5,
            ema_decay=0.98,
            student_optim=OptimConfig(lr=1e-4),
            aux_optim=OptimConfig(lr=3e-4),
            ayf=AyfSettings(derivative_span=DERIVATIVE_SPAN),
            meanflow=MeanFlowSettings(derivative_span=DERIVATIVE_SPAN),
        ),
        train=TrainConfig(updates=400, batch_size=64),
    ),
)
