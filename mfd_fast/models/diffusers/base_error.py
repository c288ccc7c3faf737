"""What a format of the frozen base changes in the teacher, on the user's own prompts."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from mfd_fast.flow.times import uniform_schedule
from mfd_fast.models.diffusers.backbone import teacher_samples
from mfd_fast.models.diffusers.base import free_memory
from mfd_fast.models.diffusers.presets import PipelineRun
from mfd_fast.models.diffusers.task import SEED, PipelineTask
from mfd_fast.run.device import pick_device

PROMPTS = 4
SHARE = 0.7  # of the free memory that the network in its own dtype may take; others are swapped


def base_error(config: PipelineRun) -> str:
    """``|u_q - u| / |u|`` of the guided mean velocity u from noise to data, in words.

    u_q is of the base in the config's format, u of the plain one, both from the same noise by the
    run's own steps, for the first prompts.  The bound is what these steps change themselves:
    against steps of half the length.  ``ValueError`` for a base that is the plain one.
    """
    base = config.pipeline.base
    if base in ("bf16", "auto"):
        raise ValueError(
            f"--check-base compares another format with bf16: add --base int8 or nf4, not {base}"
        )
    steps = math.ceil(1 / config.distill.step_size)
    budget = SHARE * free_memory(pick_device(config.train.device)) / 1e9
    plain = replace(config, pipeline=replace(config.pipeline, base="bf16", base_memory=budget))
    exact, finer = mean_velocities(plain, (steps, 2 * steps))
    (rounded,) = mean_velocities(config, (steps,))
    error, bound = _distance(rounded, exact), _distance(exact, finer)
    said = (
        f"base {base}: the guided mean velocity differs from that in {config.pipeline.dtype} by "
        f"{error:.2%} over {len(exact)} prompts; steps of {1 / steps:g} themselves make {bound:.2%}"
    )
    if error <= bound:
        return f"{said}: below that"
    larger = {"nf4": "int8", "float8": "int8", "int8": "bf16"}[base]
    return f"{said}: above that, take --base {larger}"


@torch.no_grad()
def mean_velocities(config: PipelineRun, steps: tuple[int, ...]) -> list[Tensor]:
    """u ``[N, *S]`` of the guided teacher by so many equal steps, a prompt at a time."""
    task = PipelineTask(config)
    count = min(PROMPTS, len(task.prompts))
    cond = task.text.encode(task.prompts[:count])
    backbone, noise = task.backbone(), task.noise(count, SEED)
    guidance, made = task.config.distill.guidance, []
    for number in steps:
        rows = []
        for k in range(count):
            row = {name: leaf[k : k + 1] for name, leaf in cond.items()}
            x = noise[k : k + 1]
            end = teacher_samples(backbone, row, x, uniform_schedule(number), guidance)
            rows.append((x - end).to("cpu"))
        made.append(torch.cat(rows))
    return made


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
