"""The student's weights for whoever samples from them or keeps them: as trained, or averaged."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mfd_fast.backbones.lanes import Backbone, swapped
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.optim import average_
from mfd_fast.distill.ranks import local


class StudentWeights:
    """What a ``Distiller`` does with the weights of its student besides training them."""

    backbone: Backbone
    config: DistillConfig
    ema: list[Tensor]
    num_updates: dict[str, int]
    cycle_length: int

    @contextmanager
    def averaged_student(self, use_ema: bool = True) -> Iterator[None]:
        """Inside the block the student holds its averaged weights (if an average is kept)."""
        if not (use_ema and self.ema):
            yield
            return
        try:
            student = [p.detach() for p in self.backbone.parameters_of("student")]
            with swapped(local(student), local(self.ema)):
                self.backbone.refresh("student")
                yield
        finally:
            self.backbone.refresh("student")

    def student_network(self, *, use_ema: bool = True) -> nn.Module:
        """A copy of the student as a network of its own, in eval mode; averaged weights if kept.

        Adapters are merged into it.  ``ValueError`` if its weights are spread over ranks.
        """
        self._warn_if_untrained(stacklevel=3)
        with self.averaged_student(use_ema):
            return self.backbone.student_network()

    def _average(self, skipped: Tensor) -> None:
        """Let the average follow an update of the student, skipped ``[]`` or not."""
        if self.ema:
            student = self.backbone.parameters_of("student")
            average_(self.ema, student, decay=self.config.ema_decay, skipped=skipped)

    def _warn_if_untrained(self, *, stacklevel: int) -> None:
        if self.num_updates["student"] == 0:
            before = self.cycle_length - self.config.student_updates
            warnings.warn(
                f"the student is still what it started as: a cycle of step() is {before} updates "
                f"of the auxiliary, then the student's, and {self.num_updates['aux']} were made",
                stacklevel=stacklevel,
            )
