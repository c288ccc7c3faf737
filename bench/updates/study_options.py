"""What the options that save evaluations do to the digits student: one run each, same seed.

python -m bench.study_options --out bench/results/study_options_cpu.json

Every variant is `mfd-fast distill digits` with the overrides below, the same number of student
updates and the same evaluation.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from torch import Generator

from mfd_fast.backbones.lanes import trajectory_lanes
from mfd_fast.distill.registry import make_objective
from mfd_fast.models.presets import preset
from mfd_fast.run.config import to_dict
from mfd_fast.run.environment import environment
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


def run(overrides: dict, updates: int) -> dict:
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
        "overrides": overrides,
        "seconds": round(results["seconds"], 1),
        "evaluations_per_lane": round(evaluations_per_lane(config), 2),
        "evaluations_per_cycle": round(evaluations_per_cycle(config), 1),
        "student": student,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=preset("digits").train.updates)
    args = parser.parse_args()
    document = {
        "study": "options",
        **environment("cpu"),
        "config": to_dict(preset("digits")),
        "updates": args.updates,
        "variants": {},
    }
    for name, overrides in VARIANTS.items():
        document["variants"][name] = run(overrides, args.updates)
        args.out.write_text(json.dumps(document, indent=1) + "\n")
        print(name, document["variants"][name], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
