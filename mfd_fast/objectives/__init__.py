"""What moves the student.  One file per objective, one interface, chosen by
``distill.objective``.
"""

from mfd_fast.config import DistillConfig
from mfd_fast.objectives.base import IntervalObjective, Objective
from mfd_fast.objectives.mfd import MeanFlowDistillation
from mfd_fast.objectives.vsd import VariationalScoreDistillation

OBJECTIVES: dict[str, type] = {"mfd": MeanFlowDistillation, "vsd": VariationalScoreDistillation}


def make_objective(config: DistillConfig) -> Objective:
    """The objective named by ``config.objective``; ``ValueError`` lists the known ones."""
    if config.objective not in OBJECTIVES:
        raise ValueError(
            f"distill.objective must be one of {sorted(OBJECTIVES)}, got {config.objective!r}"
        )
    return OBJECTIVES[config.objective](config)


__all__ = ["OBJECTIVES", "IntervalObjective", "Objective", "make_objective"]
