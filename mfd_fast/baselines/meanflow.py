"""MeanFlow (Geng et al. 2025): average velocities learnt from data, without a teacher.

    v      = eps - x_0,   x_t = (1 - t) x_0 + t eps
    target = sg( v - (t - r) d/dt u(x_t, r, t) ),   d/dt along (v, 0, 1)      (Eq. 9-11 there)
    loss   = w |u - target|^2,   w = sg( 1 / (|u - target|^2 + c)^p )

A share of the samples takes r = t, where the target is v.  One step: eps - u(eps, 0, 1).

p = 1 and three quarters of r = t are the authors' for ImageNet latents; for CIFAR-10 they take
p = 0.75, a quarter of r = t and logit-normal times of mean -2 and deviation 2: set ``power``,
``equal_fraction``, ``distill.time_mean`` and ``distill.time_std``.
"""

import torch
from torch import Tensor

from mfd_fast.baselines.batch import Batch, ComparedObjective, along_flow, column
from mfd_fast.distill.objectives import Metrics
from mfd_fast.ops import interpolate_with_target


class MeanFlow(ComparedObjective):
    """Needs data and a student with a second time; the teacher only lends its weights."""

    sampler = "map"
    second_time = True

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        settings = self.config.meanflow
        t, r = batch.time_pairs(self.config, equal_fraction=settings.equal_fraction)
        x, v = interpolate_with_target(batch.data, batch.noise(), t)
        target = self.target(batch, x, t, r, v)
        error = (batch.fields.student(x, t, r) - target).flatten(1).square().sum(1)
        weight = (error.detach() + settings.constant) ** -settings.power
        return (weight * error).mean(), {"distance": error.detach().sqrt().mean()}

    @torch.no_grad()
    def target(self, batch: Batch, x: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
        """What u(x, r, t) should be ``[B, *S]``, given the velocity v of x at t."""
        over = self.config.meanflow.derivative_span
        _, rate = along_flow(lambda x, t: batch.fields.student(x, t, r), x, t, v, end=r, over=over)
        return v - column(t - r, x) * rate
