"""Rectified reflow (Liu et al., "Flow Straight and Fast", 2023, section 2.2): straighten the flow.

    z ~ N(0, I),  x_0 = ODE(z) of the guided teacher,  x_t = (1 - t) x_0 + t z
    loss = | F(x_t, t) - (z - x_0) |^2

A straight flow is its fixed point, where one Euler step is exact.  The pairs are made as they are
used, 1/h teacher steps each.
"""

import torch.nn.functional as F
from torch import Tensor

from mfd_fast.baselines.batch import Batch, ComparedObjective
from mfd_fast.distill.objectives import Metrics
from mfd_fast.ops import interpolate_with_target


class Reflow(ComparedObjective):
    """Needs a teacher only."""

    uses_data = False

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        z, t = batch.noise(), batch.times(self.config)
        x0 = batch.fields.teacher_samples(z, steps=max(1, round(1.0 / self.config.step_size)))
        x_t, target = interpolate_with_target(x0, z, t)
        v = batch.fields.student(x_t, t)
        error = (v.detach() - target).flatten(1)
        return F.mse_loss(v, target), {"distance": error.norm(dim=1).mean()}
