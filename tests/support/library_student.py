"""The library form in one or several processes; run by ``example_worker``."""

import os

import torch
from tiny_pipelines import tiny_pipeline

from mfd_fast import DistillConfig
from mfd_fast.diffusers import distillation

PROMPTS = ["a red fox", "two boats", "a cat", "a much longer prompt: a cat on the snow"]


def main(updates: int = 6, world: int = 0) -> dict[str, torch.Tensor]:
    """The student's adapter; ``world``: of whose processes this one alone does its share."""
    rank, found = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if found > 1:
        torch.distributed.init_process_group("gloo")
    config = DistillConfig(aux_updates=2, step_size=0.3)
    d = distillation(tiny_pipeline("sd3"), height=64, width=64, rank=2, steps=2, config=config)
    cond = d.cond(PROMPTS[rank :: world or found])
    for _ in range(updates):
        d.step(cond)
    return d.backbone.adapters.adapter_state_dict("student", prefix="")
