"""The checkpoint's own few-step sampler as a solver of the engine: DPM-Solver++ 2M."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mfd_fast.flow.times import Schedule, dpm_flow_schedule
from mfd_fast.models.sana.loading import read_checkpoint_json

SCHEDULER = "scheduler/scheduler_config.json"
SOLVER = "dpmpp_2m"
CLASS = "DPMSolverMultistepScheduler"
EXPECTED = {  # what the solver table computes; other values are refused by name
    "_class_name": CLASS,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "euler_at_final": False,
    "use_lu_lambdas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
}
FLOW_SHIFT = "flow_shift"
TRAIN_STEPS = "num_train_timesteps"
# What diffusers' class takes for an entry that is not there: not always what is needed here.
DEFAULTS = {
    **{key: EXPECTED[key] for key in EXPECTED if key != "_class_name"},
    **{"prediction_type": "epsilon", "use_flow_sigmas": False, FLOW_SHIFT: 1.0, TRAIN_STEPS: 1000},
}


def load_schedule(
    folder_or_id: str | Path, revision: str | None = None
) -> Callable[[int], Schedule]:
    """``steps -> Schedule`` of a checkpoint's scheduler, to be used with the solver ``SOLVER``.

    Raises:
        FileNotFoundError: the checkpoint has no scheduler_config.json.
        ValueError: it is another sampler, by the entry that differs.
    """
    return schedule_of(read_checkpoint_json(folder_or_id, SCHEDULER, revision))


def schedule_of(entries: Mapping[str, Any]) -> Callable[[int], Schedule]:
    """The same from the entries of scheduler_config.json."""
    for key, expected in EXPECTED.items():
        got = entries.get(key, DEFAULTS.get(key))
        if got != expected:
            default = "" if key in entries else f" (it has no such entry, and {CLASS} takes that)"
            raise ValueError(
                f"the checkpoint's scheduler has {key}={got!r}{default}; the student's sampler is "
                f"made for {expected!r} (DPM-Solver++ 2M with flow sigmas, what SANA checkpoints "
                "ship)"
            )
    shift, train_steps = (entries.get(key, DEFAULTS[key]) for key in (FLOW_SHIFT, TRAIN_STEPS))
    is_number = type(shift) in (int, float) and 0 < shift < math.inf
    if not is_number or type(train_steps) is not int or train_steps < 1:
        raise ValueError(
            f"the checkpoint's scheduler has {FLOW_SHIFT}={shift!r} and {TRAIN_STEPS}="
            f"{train_steps!r}; expected a finite number > 0 and a whole one >= 1: copy it again"
        )
    return lambda steps: dpm_flow_schedule(steps, shift=shift, train_steps=train_steps)
