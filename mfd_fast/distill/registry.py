"""What moves the student.  One file per objective, one interface, chosen by
``distill.objective``; only the file of the chosen one is imported.
"""

from importlib import import_module

from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.objectives import IntervalObjective, Objective

OBJECTIVES: dict[str, str] = {
    "mfd": "mfd_fast.distill.mfd:MeanFlowDistillation",
    "vsd": "mfd_fast.distill.vsd:VariationalScoreDistillation",
    "dmd2": "mfd_fast.baselines.dmd2:DistributionMatching",
    "senseflow": "mfd_fast.baselines.senseflow:SenseFlow",
    "cd": "mfd_fast.baselines.cd:ConsistencyDistillation",
    "ayf": "mfd_fast.baselines.ayf:AlignYourFlow",
    "meanflow": "mfd_fast.baselines.meanflow:MeanFlow",
    "imm": "mfd_fast.baselines.imm:InductiveMomentMatching",
    "reflow": "mfd_fast.baselines.reflow:Reflow",
}


def make_objective(config: DistillConfig) -> Objective:
    """The objective named by ``config.objective``; ``ValueError`` lists the known ones."""
    if config.objective not in OBJECTIVES:
        raise ValueError(
            f"distill.objective must be one of {sorted(OBJECTIVES)}, got {config.objective!r}"
        )
    module, name = OBJECTIVES[config.objective].split(":")
    return getattr(import_module(module), name)(config)


__all__ = ["OBJECTIVES", "IntervalObjective", "Objective", "make_objective"]
