"""Intervals capped in length (``max_interval``): quality against evaluations, on the toys.

Not in the paper, which draws (t, r) freely; the option is this project's.
"""

from pathlib import Path
from typing import Any

from torch import Generator

from mfd_fast.distill.objectives import make_objective
from studies.digits_runs import mean_and_spread
from studies.plots import COLOURS, Figure, titled
from studies.toy_runs import distance_to_teacher, distil_toy, toy_config
from studies.toys import TOYS
from studies.verdict import Verdict

CLAIM = "None in the paper: intervals are not capped there"
RULE = "there is no claim to test"
CAPS: tuple[float | None, ...] = (None, 0.5, 0.3, 0.1)
NUM_SEEDS = 3
UPDATES = 150
BATCH = 128
DRAWS = 4000


def run(seed: int, folder: Path) -> dict[str, Any]:
    rows = []
    for toy in TOYS:
        for objective, caps in (("mfd", CAPS), ("vsd", (None,))):
            for cap in caps:
                settings = {"objective": objective, "max_interval": cap}
                distances = [measured(toy, seed + i, settings) for i in range(NUM_SEEDS)]
                mean, spread = mean_and_spread(distances)
                rows.append(
                    {"toy": toy, **settings, "evaluations": evaluations(settings),
                     "distance": mean, "distance_std": spread, "seeds": distances}
                )  # fmt: skip
    return {"updates": UPDATES, "batch": BATCH, "rows": rows}


def measured(toy: str, seed: int, settings: dict[str, Any]) -> float:
    """Energy distance to the teacher's samples after one run."""
    config = toy_config(seed=seed, **settings)
    distiller, _ = distil_toy(toy, config, updates=UPDATES, batch=BATCH)
    return distance_to_teacher(toy, distiller)


def evaluations(settings: dict[str, Any]) -> float:
    """Mean number of evaluations of a lane in one student update."""
    objective = make_objective(toy_config(**settings))
    return objective.draw(DRAWS, Generator().manual_seed(0)).num_evaluations / DRAWS


def label(row: dict[str, Any]) -> str:
    if row["objective"] == "vsd":
        return "vsd"
    return "no cap" if row["max_interval"] is None else f"cap {row['max_interval']:g}"


def draw(figures: dict[str, Any], path: Path) -> None:
    toys = list(dict.fromkeys(row["toy"] for row in figures["rows"]))
    figure = Figure(columns=len(toys), title="Capped intervals: quality against evaluations")
    for axis, toy in zip(figure.axes, toys, strict=True):
        rows = [row for row in figures["rows"] if row["toy"] == toy]
        for row, colour in zip(rows, COLOURS, strict=False):
            axis.errorbar(row["evaluations"], row["distance"], yerr=row["distance_std"],
                          fmt="o", color=colour, capsize=3, label=label(row))  # fmt: skip
        axis.legend(fontsize=8, frameon=False)
        titled(axis, toy.replace("_", " "), "evaluations of a lane", "energy distance to teacher")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    parts = []
    for toy in dict.fromkeys(row["toy"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["toy"] == toy]
        parts.append(
            f"{toy.replace('_', ' ')}: "
            + ", ".join(
                f"{label(r)} {r['distance']:.4f} (sd {r['distance_std']:.4f})" for r in rows
            )
        )
    return Verdict("no claim", "energy distance to the teacher; " + "; ".join(parts))
