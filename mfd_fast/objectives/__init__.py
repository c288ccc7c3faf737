"""What moves the student.  One file per objective, one interface, chosen by
``distill.objective``; only the file of the chosen one is imported.
"""

from importlib import import_module

from mfd_fast.config import DistillConfig
from mfd_fast.objectives.base import IntervalObjective, Objective

OBJECTIVES: dict[str, str] = {
    "mfd": "mfd:MeanFlowDistillation",
    "vsd": "vsd:VariationalScoreDistillation",
    "dmd2": "dmd2:DistributionMatching",
    "senseflow": "senseflow:SenseFlow",
    "cd": "cd:ConsistencyDistillation",
    "ayf": "ayf:AlignYourFlow",
    "meanflow": "meanflow:MeanFlow",
    "imm": "imm:InductiveMomentMatching",
    "reflow": "reflow:Reflow",
}


def make_objective(config: DistillConfig) -> Objective:
    """The objective named by ``config.objective``; ``ValueError`` lists the known ones."""
    if config.objective not in OBJECTIVES:
        raise ValueError(
            f"distill.objective must be one of {sorted(OBJECTIVES)}, got {config.objective!r}"
        )
    module, name = OBJECTIVES[config.objective].split(":")
    return getattr(import_module(f"{__name__}.{module}"), name)(config)


__all__ = ["OBJECTIVES", "IntervalObjective", "Objective", "make_objective"]
