"""Distillations of two-dimensional toys: a small network, seconds a run."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.distill.config import DistillConfig, OptimConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.flow.integrate import generate
from mfd_fast.flow.times import sample_times
from mfd_fast.ops import interpolate_with_target
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.loop import train
from studies.toys import sample_toy

WIDTH = 128
NUM_FREQUENCIES = 8
TEACHER_UPDATES = 2000
TEACHER_BATCH = 512
TEACHER_LR = 2e-3
TEACHER_STEPS = 100


class ToyVelocity(nn.Module):
    """``v(x, t, cond)`` of points ``[B, 2]``; the condition is not looked at."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 2 * NUM_FREQUENCIES, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, 2),
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        angle = torch.pi / 2 * t[:, None] * torch.arange(NUM_FREQUENCIES, device=t.device)
        return self.layers(torch.cat((x, angle.cos(), angle.sin()), dim=1))


@cache
def toy_teacher(name: str, seed: int = 0) -> ToyVelocity:
    """A flow-matching network of the toy, trained once a process."""
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyVelocity()
    optimizer = torch.optim.Adam(model.parameters(), lr=TEACHER_LR)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHER_UPDATES)
    for _ in range(TEACHER_UPDATES):
        t = sample_times(TEACHER_BATCH, "uniform", generator=generator)
        noise = torch.randn(TEACHER_BATCH, 2, generator=generator)
        x_t, target = interpolate_with_target(sample_toy(name, TEACHER_BATCH, generator), noise, t)
        optimizer.zero_grad()
        F.mse_loss(model(x_t, t, t), target).backward()
        optimizer.step()
        decay.step()
    return model.eval()


@cache
def teacher_samples(name: str, size: int, seed: int) -> Tensor:
    """Samples ``[size, 2]`` of the toy's teacher."""
    model = toy_teacher(name)
    noise = torch.randn(size, 2, generator=Generator().manual_seed(seed))
    with torch.no_grad():
        return generate(lambda x, t: model(x, t, t), noise, steps=TEACHER_STEPS)


def toy_config(**settings: Any) -> DistillConfig:
    """Settings of a toy run; w = 1 because there is no condition."""
    optim = OptimConfig(lr=1e-3, weight_decay=0.0)
    defaults: dict[str, Any] = {
        "guidance": 1.0,
        "step_size": 0.05,
        "aux_updates": 5,
        "ema_decay": 0.95,
        "student_optim": optim,
        "aux_optim": optim,
    }
    return DistillConfig(**(defaults | settings))


def distil_toy(
    name: str, config: DistillConfig, *, updates: int, batch: int = 256, log_every: int = 10
) -> tuple[Distiller, list[dict[str, Any]]]:
    """Distil the toy's teacher; the distiller and the logged rows."""
    distiller = Distiller(CopiedBackbone(toy_teacher(name), sample_shape=(2,)), config)
    cond = torch.empty(batch, 0)
    loop = TrainConfig(updates=updates, batch_size=batch, log_every=log_every, device="cpu")
    return distiller, train(distiller, lambda n: cond, loop)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of samples ``[N, D]`` and ``[M, D]``; 0 for equal laws.

    U-statistic: the zero distances of points to themselves are left out.  Szekely and Rizzo (2013).
    """
    n, m = len(a), len(b)
    within_a = torch.cdist(a, a).sum() / (n * (n - 1))
    within_b = torch.cdist(b, b).sum() / (m * (m - 1))
    return (2 * torch.cdist(a, b).mean() - within_a - within_b).item()


def distance_to_teacher(name: str, distiller: Distiller, size: int = 2000) -> float:
    """Energy distance of one-step samples to the teacher's, from other noise."""
    noise = torch.randn(size, 2, generator=Generator().manual_seed(1))
    samples = distiller.generate(noise, torch.empty(size, 0))
    return energy_distance(samples, teacher_samples(name, size, seed=2))
