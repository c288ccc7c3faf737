"""Step size of the mean velocities (paper Tables 2 and 7), on a toy: quality against h."""

from pathlib import Path
from typing import Any

from studies.digits_runs import mean_and_spread
from studies.plots import BLUE, Figure, titled
from studies.toy_runs import distance_to_teacher, distil_toy, toy_config
from studies.verdict import Verdict

CLAIM = "Moderate steps are best (.005 to .03); very small (.001) and large (.1, .5) ones are worse"
RULE = (
    "the best h is a moderate one, and .001, .1 and .5 are each worse than it by more than the sum "
    "of both standard deviations"
)
TOY = "gaussian_mixture"
STEP_SIZES = (0.001, 0.005, 0.02, 0.03, 0.1, 0.5)
MODERATE = (0.005, 0.02, 0.03)
NUM_SEEDS = 3
UPDATES = 150
BATCH = 128


def run(seed: int, folder: Path) -> dict[str, Any]:
    rows = []
    for h in STEP_SIZES:
        distances = [measured(h, seed + i) for i in range(NUM_SEEDS)]
        mean, spread = mean_and_spread(distances)
        rows.append({"step_size": h, "distance": mean, "distance_std": spread, "seeds": distances})
    return {"toy": TOY, "updates": UPDATES, "batch": BATCH, "rows": rows}


def measured(h: float, seed: int) -> float:
    """Energy distance to the teacher's samples after one run."""
    config = toy_config(step_size=h, seed=seed)
    distiller, _ = distil_toy(TOY, config, updates=UPDATES, batch=BATCH)
    return distance_to_teacher(TOY, distiller)


def draw(figures: dict[str, Any], path: Path) -> None:
    rows = figures["rows"]
    figure = Figure(columns=1, title="Step size of the mean velocities")
    axis = figure.axes[0]
    axis.errorbar(
        [row["step_size"] for row in rows],
        [row["distance"] for row in rows],
        yerr=[row["distance_std"] for row in rows],
        fmt="o-",
        color=BLUE,
        capsize=3,
    )
    axis.set_xscale("log")
    titled(axis, f"{NUM_SEEDS} seeds, one standard deviation", "h", "energy distance to teacher")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    rows = {row["step_size"]: row for row in figures["rows"]}
    best = min(rows.values(), key=lambda row: row["distance"])
    ends = [row for h, row in rows.items() if h not in MODERATE]
    holds = best["step_size"] in MODERATE and all(
        row["distance"] - best["distance"] > row["distance_std"] + best["distance_std"]
        for row in ends
    )
    values = ", ".join(
        f"h {h:g}: {row['distance']:.4f} (sd {row['distance_std']:.4f})" for h, row in rows.items()
    )
    return Verdict.of(holds, f"energy distance to the teacher on the toy: {values}")
