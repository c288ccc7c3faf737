"""Coverage of all nine objectives at equal time, as in ``coverage``, whose runs are not repeated.

Without guidance and from one teacher; equal are the operations of the run, counted in forward
evaluations of a sample.  cd takes steps of 0.25 along the teacher: consistency spreads from t = 0
by one step of the grid at a time.
"""

from pathlib import Path
from typing import Any, get_args

from mfd_fast.baselines.config import ObjectiveName
from studies.coverage import compared, draw, numbers_of, table
from studies.verdict import Verdict

__all__ = ["draw", "table"]
CLAIM = "None in the paper: D.1 compares five of the nine"
RULE = "there is no claim to test"


def run(seed: int, folder: Path) -> dict[str, Any]:
    return compared(get_args(ObjectiveName), ("time",), seed, folder)


def judge(figures: dict[str, Any]) -> Verdict:
    numbers = numbers_of(figures, "time")
    return Verdict("no claim", f"Frechet distance to the data and recall; {numbers}")
