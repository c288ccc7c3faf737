"""SenseFlow (Ge et al. 2026): dmd2 and two stabilisers.

    IDA (implicit distribution alignment), after each student update that was not skipped:
        phi_A <- lambda phi_A + (1 - lambda) theta_S
    ISG (intra-segment guidance), for a segment [r, t] of the student's sampler, t_mid inside it:
        x_mid = the teacher's ODE from x_t to t_mid,   target = sg( student(x_mid -> r) )
        | student(x_t -> r) - target |^2

Its discriminator works on frozen vision features: any function of the samples
(``ComparisonDistiller(features=...)``), or the middle of the teacher on noised samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mfd_fast.baselines.batch import Batch, column
from mfd_fast.baselines.dmd2 import DistributionMatching, Segment, middle_width, with_middle
from mfd_fast.distill.objectives import Metrics
from mfd_fast.distill.optim import average_
from mfd_fast.flow.solvers import to_device
from mfd_fast.ops import interpolate


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

    def fake_logit(self, batch: Batch, x0: Tensor, features: Tensor) -> Tensor:
        return self.logit(batch, x0, batch.times(self.config))

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        segment = self.segment(batch)
        loss, metrics = self.matching_loss(batch, segment.x0)
        if self.config.senseflow.isg_weight > 0:
            guide = F.mse_loss(segment.x_r, self.guidance_target(batch, segment))
            loss = loss + self.config.senseflow.isg_weight * guide
        return loss, metrics

    @torch.no_grad()
    def guidance_target(self, batch: Batch, segment: Segment) -> Tensor:
        """student(x_mid -> r) with x_mid on the teacher's trajectory from (x, t); ``[B, *S]``."""
        length = segment.t - segment.r
        middle = segment.r + length * torch.rand(batch.size, generator=batch.host)
        start = torch.full((batch.size,), segment.t)
        x_middle = batch.fields.teacher_end(segment.x, start, middle, self.config)
        t = to_device(middle, batch.device)
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
