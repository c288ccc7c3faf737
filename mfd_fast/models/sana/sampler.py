"""The checkpoint's own few-step sampler as a solver of the engine: DPM-Solver++ 2M."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mfd_fast.flow import Schedule, dpm_flow_schedule
from mfd_fast.models.sana.loading import read_checkpoint_json

SCHEDULER = "scheduler/scheduler_config.json"
SOLVER = "dpmpp_2m"
EXPECTED = {  # what the solver table computes; other values are refused by name
    "_class_name": "DPMSolverMultistepScheduler",
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
DEFAULTS = {FLOW_SHIFT: 1.0, TRAIN_STEPS: 1000}  # diffusers' own


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
        got = entries.get(key, expected)
        if got != expected:
            raise ValueError(
                f"the checkpoint's scheduler has {key}={got!r}; the student's sampler is made for "
                f"{expected!r} (DPM-Solver++ 2M with flow sigmas, what SANA checkpoints ship)"
            )
    shift = float(entries.get(FLOW_SHIFT, DEFAULTS[FLOW_SHIFT]))
    train_steps = int(entries.get(TRAIN_STEPS, DEFAULTS[TRAIN_STEPS]))
    return lambda steps: dpm_flow_schedule(steps, shift=shift, train_steps=train_steps)
