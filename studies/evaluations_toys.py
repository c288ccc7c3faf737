"""Savings of evaluations alone and together on two toys, and shared samples in a batch of one.

The interval and when a saving pays are those of the evaluations study; five seeds.  A batch of one
sample is what SANA's presets train on: sharing means there that the auxiliary of a cycle sees one
sample in place of ``aux_updates``.  A student of four steps is SANA's: its samples cost four
evaluations each; there is also a gradient into one random step, which spares backward passes alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from studies.evaluation_runs import Setting
from studies.evaluations import AB2, COMBINED, NUM_SEEDS, PRESET, TOYS, holds, intervals, measured
from studies.plots import Figure
from studies.savings import SeveralEnds, TwoNodes
from studies.verdict import Verdict

CLAIM = "None in the paper: Euler steps and new samples for each auxiliary update are given"
RULE = "a saving pays on both toys: its paired interval reaches zero or the better side"
LONGER, SHARED = "AB2, h = .2", "a cycle's samples"
ALONE = {
    LONGER: Setting(AB2),
    "DPM-Solver++ 2M, h = .2": Setting(AB2 | {"solver": "dpmpp_2m"}),
    "two AB2 steps, however long": Setting(objective=TwoNodes),
    "2 updates of 4 draws": Setting({"aux_updates": 2, "aux_draws_per_sample": 4}),
    SHARED: Setting({"aux_samples": "cycle"}),
    "the student's samples": Setting({"aux_samples": "student"}),
    "those of 4 student updates": Setting({"aux_samples": "student", "aux_kept": 4}),
    "updates by need": Setting(by_need=True),
    "3 intervals a trajectory": Setting(objective=SeveralEnds),
}
ONE, FOUR = "two_moons, batch 1", "two_moons, 4 steps"


def of_four_steps(settings: dict[str, Setting]) -> dict[str, Setting]:
    """The same with a student of four steps."""
    return {
        name: replace(setting, overrides={**setting.overrides, "student_steps": 4})
        for name, setting in settings.items()
    }


SETTINGS = {
    **dict.fromkeys(TOYS, PRESET | ALONE | COMBINED),
    FOUR: of_four_steps(
        PRESET
        | {SHARED: ALONE[SHARED]}
        | {"a random step's gradient": Setting({"student_backprop": "random"})}
        | COMBINED
    ),
    ONE: PRESET | {SHARED: ALONE[SHARED]} | COMBINED,
}


def run(seed: int, folder: Path) -> dict[str, Any]:
    runs = folder / "evaluations"
    runs.mkdir(parents=True, exist_ok=True)
    seeds = range(seed, seed + NUM_SEEDS)
    return {place: measured(place, SETTINGS[place], seeds, runs) for place in SETTINGS}


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=len(figures), title="Savings on the toys", height=4.2)
    for axis, (place, rows) in zip(figure.axes, figures.items(), strict=True):
        intervals(axis, place, rows)
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    toys = [figures[place] for place in TOYS]
    paying = [
        name
        for name in toys[0]
        if name != "preset"
        and toys[0][name]["share"] < 1
        and all(holds(rows[name], "to teacher") for rows in toys)
    ]
    return Verdict.of(bool(paying), f"paying on both toys: {', '.join(paying) or 'none'}")
