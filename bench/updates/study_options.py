"""What the options that save evaluations do to the digits student: one run each, same seed.

Every variant is `mfd-fast distill digits` with the overrides below, the same number of student
updates and the same evaluation.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Generator

from bench.running import Options
from mfd_fast.backbones.lanes import trajectory_lanes
from mfd_fast.distill.objectives import make_objective
from mfd_fast.models import preset
from mfd_fast.run.config import to_dict
from mfd_fast.run.session import run_distillation

VARIANTS = {
    "paper": {},
    "aux_draws_per_sample = 4, 2 updates": {"aux_draws_per_sample": 4, "aux_updates": 2},
    "2 auxiliary updates, 1 draw": {"aux_updates": 2},
    "max_interval = 0.3": {"max_interval": 0.3},
    "euler, h = 0.1": {"step_size": 0.1},
    "ab2, h = 0.1": {"solver": "ab2", "step_size": 0.1},
    "heun, h = 0.1": {"solver": "heun", "step_size": 0.1},
}


def evaluations_per_lane(config, draws: int = 2000) -> float:
    """Mean evaluations of one lane of one sample under the variant's intervals and solver."""
    table = make_objective(config.distill).draw(draws, Generator().manual_seed(0))
    return table.num_evaluations / draws


def evaluations_per_cycle(config) -> float:
    """Of one sample: generate, train the auxiliary, integrate the lanes; backward not counted."""
    distill = config.distill
    lanes = len(trajectory_lanes(distill.guidance))
    aux = distill.aux_updates * (distill.student_steps + distill.aux_draws_per_sample)
    return aux + distill.student_steps + lanes * evaluations_per_lane(config)


def row(name: str, overrides: dict, updates: int) -> dict:
    base = preset("digits")
    config = replace(
        base,
        distill=replace(base.distill, **overrides),
        train=replace(base.train, updates=updates),
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run_distillation(config, Path(folder) / "run")
        results = json.loads((result / "results.json").read_text())
    student = results["table"][-1]
    return {
        "variant": name,
        "overrides": overrides,
        "seconds": round(results["seconds"], 1),
        "evaluations_per_lane": round(evaluations_per_lane(config), 2),
        "evaluations_per_cycle": round(evaluations_per_cycle(config), 1),
        **{f"student_{key}": value for key, value in student.items()},
    }


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    base = preset("digits")
    updates = options.repeats or (2 if options.smoke else base.train.updates)
    chosen = {name: more for name, more in VARIANTS.items() if options.wants(name)}
    batches = ([row(name, more, updates)] for name, more in chosen.items())
    return "study_options", to_dict(base) | {"updates": updates}, batches
