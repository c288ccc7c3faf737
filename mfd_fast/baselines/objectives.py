"""Which methods MFD is compared with, and what each needs of a run."""

from mfd_fast.baselines.ayf import AlignYourFlow
from mfd_fast.baselines.batch import ComparedObjective, Needs
from mfd_fast.baselines.cd import ConsistencyDistillation
from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.baselines.dmd2 import DistributionMatching
from mfd_fast.baselines.imm import InductiveMomentMatching
from mfd_fast.baselines.meanflow import MeanFlow
from mfd_fast.baselines.reflow import Reflow
from mfd_fast.baselines.senseflow import SenseFlow
from mfd_fast.distill.config import DistillConfig

COMPARED: dict[str, type[ComparedObjective]] = {
    "dmd2": DistributionMatching,
    "senseflow": SenseFlow,
    "cd": ConsistencyDistillation,
    "ayf": AlignYourFlow,
    "meanflow": MeanFlow,
    "imm": InductiveMomentMatching,
    "reflow": Reflow,
}


def needs_of(config: DistillConfig) -> type[Needs]:
    """What ``config.objective`` needs of a run."""
    return COMPARED.get(config.objective, Needs)


def make_objective(config: ComparisonConfig) -> ComparedObjective:
    """The method that ``config.objective`` names; ``ValueError`` for what ``Distiller`` trains."""
    if config.objective not in COMPARED:
        raise ValueError(
            f"ComparisonDistiller trains {', '.join(COMPARED)}; for "
            f"distill.objective={config.objective!r} call make_distiller(backbone, config)"
        )
    return COMPARED[config.objective](config)
