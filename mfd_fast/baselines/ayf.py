"""Align Your Flow (Sabour et al. 2025): Eulerian map distillation of a flow map.

    f(x, t, s) = x + (s - t) F(x, t, s)                 from time t to the earlier time s
    df/dt      = (v_T - F) + (s - t) dF/dt              total derivative along the guided teacher
    gradient   = sign(t - s) grad f^T sg(g)

g is df/dt with the weight of its second term risen from 0 to 0.99 over the first updates,
normalised to g / (|g| + c).  df/dt vanishes for all (x, t, s) exactly at the teacher's flow map.
The times are sigmoids of N(-0.8, 1), and the weight stays below 1, as the public code has both.
"""

import torch
from torch import Tensor

from mfd_fast.baselines.batch import Batch, ComparedObjective, along_flow, column
from mfd_fast.distill.objectives import Metrics
from mfd_fast.flow.solvers import to_device
from mfd_fast.flow.times import sample_time_pairs
from mfd_fast.ops import interpolate

TIME_MEAN, TIME_STD = -0.8, 1.0
MAX_WARMTH = 0.99


class AlignYourFlow(ComparedObjective):
    """Needs a teacher, data, and a student with a second time."""

    sampler = "map"
    second_time = True

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        settings = self.config.ayf
        pairs = sample_time_pairs(batch.size, mean=TIME_MEAN, std=TIME_STD, generator=batch.host)
        t, s = (to_device(time, batch.device) for time in pairs)
        x = interpolate(batch.data, batch.noise(), t)
        warmth = min(MAX_WARMTH, batch.update / max(settings.warmup_updates, 1))
        tangent = self.tangent(batch, x, t, s, warmth)
        norm = tangent.flatten(1).norm(dim=1)
        direction = tangent / column(norm + settings.tangent_constant, x)
        f = x + column(s - t, x) * batch.fields.student(x, t, s)
        return (f * direction).mean(), {"distance": norm.mean()}

    @torch.no_grad()
    def tangent(self, batch: Batch, x: Tensor, t: Tensor, s: Tensor, warmth: float) -> Tensor:
        """df/dt along the teacher ``[B, *S]``, its (s - t) term times ``warmth``."""
        v = batch.fields.teacher(x, t)
        over = self.config.ayf.derivative_span
        field, rate = along_flow(
            lambda x, t: batch.fields.student(x, t, s), x, t, v, end=s, over=over
        )
        return v - field + warmth * column(s - t, x) * rate
