"""Updates of the methods that MFD is compared with: the same cycle, optimizers, EMA and state as
``Distiller``; the objective sees more than the student's samples.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfd_fast.backbones.lanes import CopiedBackbone, Prepared
from mfd_fast.baselines.batch import Batch, Features, Fields
from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.baselines.objectives import make_objective
from mfd_fast.baselines.sampling import few_step
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.ranks import Ranks, ranks_of
from mfd_fast.flow.times import Schedule


class ComparisonDistiller(Distiller):
    """A :class:`Distiller` for a ``ComparedObjective``.

    Args: those of ``Distiller``, and
        features: (samples -> features ``[B, D]``, D), frozen, for the discriminator of senseflow;
            the teacher's own middle features if None.

    Where the objective uses data, the condition of an update is a pair (samples of the data,
    condition).  ``ValueError`` for a backbone that is not a ``CopiedBackbone``.
    """

    def __init__(
        self,
        backbone: CopiedBackbone,
        config: ComparisonConfig,
        optimizers: Mapping[str, Optimizer] | None = None,
        *,
        schedule: Schedule | None = None,
        ranks: Ranks | None = None,
        features: tuple[Features, int] | None = None,
    ):
        name = config.objective
        if not isinstance(backbone, CopiedBackbone):
            raise ValueError(
                f"distill.objective={name!r} trains full copies of a network; expected "
                f"a CopiedBackbone, got {type(backbone).__name__}"
            )
        if config.aux_samples != "new":
            raise ValueError(
                f"distill.aux_samples must be new for distill.objective={name!r}, whose auxiliary "
                f"generates in every update; got {config.aux_samples!r}"
            )
        ranks = ranks_of(backbone) if ranks is None else ranks
        if ranks.world > 1:
            raise ValueError(
                f"distill.objective={name!r} trains in one process; got {ranks.world} ranks: start "
                "it without torchrun"
            )
        objective = make_objective(config)
        objective.bind(backbone, features)
        if "aux" not in objective.roles:
            backbone.aux = nn.Identity()  # a copy that nobody trains: let it go
        super().__init__(
            backbone, config, optimizers, schedule=schedule, ranks=ranks, objective=objective
        )

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return super().parameters_of(role) + self.objective.parameters_of(role)

    def _batch(self, cond: Any) -> Batch:
        data, cond = cond if self.objective.uses_data else (None, cond)
        prepared = self.backbone.prepare(cond)
        return Batch(
            fields=Fields(self.backbone, prepared, self.config.guidance),
            data=data,
            noise=lambda: self._noise(prepared.batch),
            host=self.host_generator,
            update=self.num_updates["student"],
            averaged=self._averaged,
            size=prepared.batch,
            device=self.backbone.device,
        )

    @contextmanager
    def _averaged(self):
        with torch.no_grad(), self.averaged_student():
            yield

    def _aux_backward(self, cond: Any, t: Tensor, x0: None = None) -> tuple[Tensor, None]:
        with self.phase("aux/forward"):
            loss = self.objective.aux_loss(self._batch(cond), t)
        self._backward("aux", loss)
        return loss.detach(), None

    def _student_backward(self, cond: Any) -> tuple[dict[str, Tensor], None]:
        with self.phase("student/forward"):
            loss, metrics = self.objective.student_loss(self._batch(cond))
        self._backward("student", loss)
        return metrics | {"student_loss": loss.detach()}, None

    def _after_step(self, role: str, skipped: Tensor) -> None:
        super()._after_step(role, skipped)
        self.objective.after_update(role, self.backbone, skipped)

    def _sample_student(
        self, noise: Tensor, prepared: Prepared, *, only_step: int | None = None
    ) -> Tensor:
        fields = Fields(self.backbone, prepared, self.config.guidance)
        return few_step(
            self.objective.sampler,
            fields.student,
            noise,
            steps=self.config.student_steps,
            solver=self.config.student_solver,
            schedule=self.schedule,
        )
