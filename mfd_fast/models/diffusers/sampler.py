"""The student's sampler, so that the stock pipeline's K steps are ours.

A pipeline that hands its scheduler no sigmas shifts twice, and its last step starts next to 0; one
with ``shift_terminal`` has no single step at all.  Nodes that make sense need an argument of the
call or another scheduler configuration, which belong to the student as its weights do.
"""

from typing import Any, NamedTuple

import torch

from mfd_fast.flow.times import Schedule
from mfd_fast.models.diffusers.checkpoint import quiet
from mfd_fast.models.diffusers.family import Cond, Family
from mfd_fast.models.diffusers.record import record, replaced

KARRAS = 7  # sigma^(1/7) of diffusers' Karras sigmas is equally spaced


class StudentSampler(NamedTuple):
    """schedule: of our sampler; scheduler: what goes into the pipeline in place of its own, or
    None; call: what ``pipe(prompt, **call)`` needs besides.
    """

    schedule: Schedule
    scheduler: Any
    call: dict[str, Any]


@quiet()
def student_sampler(family: Family, cond: Cond, steps: int) -> StudentSampler:
    """The sampler of a student of ``steps`` steps, asked of the pipeline itself.

    Args:
        cond: any conditions of the family; only the first row is used, by no network.
    """
    pipe, own = family.pipe, family.even_scheduler()
    if steps < family.least_steps:
        raise ValueError(
            f"distill.student_steps must be at least {family.least_steps} for "
            f"{type(pipe).__name__}, whose call divides by zero below; got {steps}"
        )
    changes = scheduler_changes(dict(own.config), steps)
    scheduler = None
    if changes:  # of which some schedulers keep what their constructors do not take
        scheduler = type(own).from_config(dict(own.config) | changes, **changes)
    call: dict[str, Any] = {"num_inference_steps": steps, family.scale_name: family.unguided}
    call |= family.extra
    nodes: dict[str, Any] = {}
    if not family.hands_sigmas and "solver_order" not in own.config:
        if not family.takes_sigmas:
            raise ValueError(
                f"{type(pipe).__name__} with {type(own).__name__} ends next to t = 0 and takes no "
                "sigmas: give it the scheduler that it ships with, UniPCMultistepScheduler with "
                "flow sigmas"
            )
        nodes = family.nodes_call(steps)
        call |= nodes
    first = {name: leaf[:1] for name, leaf in cond.items()}
    noise = torch.zeros(1, *family.sample_shape, device=family.device)
    with replaced(pipe, "scheduler", scheduler or own):
        schedule = record(family, first, noise, steps, **nodes).schedule
    return StudentSampler(schedule, scheduler, call)


def scheduler_changes(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """What has to change in a scheduler's configuration for Euler steps on sensible nodes."""
    changes: dict[str, Any] = {}
    if config.get("shift_terminal"):
        changes["shift_terminal"] = None
    if "solver_order" in config:
        changes["solver_order"] = 1
    if "disable_corrector" in config:
        changes["disable_corrector"] = list(range(steps))
    if config.get("final_sigmas_type") == "sigma_min" and "sigma_min" in config:
        # A call of steps + 1 makes this many, from sigma_max to sigma_min, and one that moves
        # nothing: its nodes, and 0 for the last of them.
        low, high = (config[name] ** (1 / KARRAS) for name in ("sigma_min", "sigma_max"))
        last = (high + (steps - 1) / steps * (low - high)) ** KARRAS
        changes |= {"final_sigmas_type": "zero", "sigma_min": last}
    return changes
