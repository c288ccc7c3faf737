"""SenseFlow (Ge et al. 2026): dmd2 and two stabilisers.

    IDA (implicit distribution alignment), after each student update that was not skipped:
        phi_A <- lambda phi_A + (1 - lambda) theta_S
    ISG (intra-segment guidance), for a segment [r, t] of the student's sampler, t_mid inside it:
        x_mid = one Euler step of the teacher from x_t,   target = sg( student(x_mid -> r) )
        mean( sqrt((student(x_t -> r) - target)^2 + c^2) - c ),   c = 0.001

As in the public code (SD 3.5): one step of the teacher, that distance, t_mid at least .05 away from
both ends (or a quarter of the segment), half of the states from noised data in place of backward
simulation.  Its guidance there is drawn from [2, 4], for a teacher that samples at about 4.5; here
it is the run's own.

Its discriminator works on frozen vision features: any function of the samples
(``ComparisonDistiller(features=...)``), or the middle of the teacher on noised samples.
"""

import torch
from torch import Tensor

from mfd_fast.baselines.batch import Batch, column
from mfd_fast.baselines.dmd2 import DistributionMatching, Segment, middle_width, with_middle
from mfd_fast.distill.objectives import Metrics
from mfd_fast.distill.optim import average_
from mfd_fast.flow.solvers import to_device
from mfd_fast.ops import interpolate

HUBER_CONSTANT = 0.001
MARGIN = 0.05


class SenseFlow(DistributionMatching):
    """Needs what dmd2 needs."""

    def bind(self, backbone, features) -> None:
        super().bind(backbone, None)
        self.features, width = features or (None, middle_width(backbone.teacher))
        self.head = self.make_head(backbone, width)

    def logit(self, batch: Batch, x0: Tensor, t: Tensor) -> Tensor:
        if self.features is not None:
            return self.head(self.features(x0))
        x_t = interpolate(x0, batch.noise(), t)
        teacher, cond = batch.fields.backbone.teacher, batch.fields.prepared.cond
        return self.head(with_middle(teacher, lambda: teacher(x_t, t, cond))[1])

    def state(self, batch: Batch, k: int) -> Tensor:
        if k == 0 or torch.rand((), generator=batch.host) < 0.5:  # at t = 1 both are noise
            return super().state(batch, k)
        t = torch.full((batch.size,), self.schedule.nodes[k], device=batch.device)
        return interpolate(batch.data, batch.noise(), t)

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        segment = self.segment(batch)
        loss, metrics = self.matching_loss(batch, segment.x0)
        if self.config.senseflow.isg_weight > 0:
            error = segment.x_r - self.guidance_target(batch, segment)
            guide = ((error.square() + HUBER_CONSTANT**2).sqrt() - HUBER_CONSTANT).mean()
            loss = loss + self.config.senseflow.isg_weight * guide
        return loss, metrics

    @torch.no_grad()
    def guidance_target(self, batch: Batch, segment: Segment) -> Tensor:
        """student(x_mid -> r) with x_mid one step of the teacher from (x, t); ``[B, *S]``."""
        length = segment.t - segment.r
        margin = min(MARGIN, length / 4)
        share = torch.rand(batch.size, generator=batch.host)
        t = to_device(segment.r + margin + (length - 2 * margin) * share, batch.device)
        start = torch.full_like(t, segment.t)
        velocity = batch.fields.teacher(segment.x, start)
        x_middle = segment.x - column(start - t, segment.x) * velocity
        return x_middle - column(t - segment.r, x_middle) * batch.fields.student(x_middle, t)

    @torch.no_grad()
    def after_update(self, role: str, backbone, skipped: Tensor) -> None:
        if role == "student":
            average_(
                backbone.parameters_of("aux"),
                backbone.parameters_of("student"),
                decay=self.config.senseflow.ida_decay,
                skipped=skipped,
            )
            backbone.refresh("aux")
