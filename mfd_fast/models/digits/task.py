"""The ``digits`` preset: the packaged 8x8 class-conditional DiT, distilled into few steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mfd_fast.backbones.activation import apply_activation_policy
from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.flow.solvers import to_device
from mfd_fast.metrics.image_features import few_samples
from mfd_fast.models.digits.classifier import NUM_CLASSES, NUM_FEATURES
from mfd_fast.models.digits.data import load_digits
from mfd_fast.models.digits.dit import load_dit, save_dit
from mfd_fast.models.digits.evaluate import (
    COLUMNS,
    TEACHER_STEPS,
    evaluate_digits,
    teacher_samplers,
)
from mfd_fast.models.digits.teacher import load_classifier, load_teacher
from mfd_fast.models.images import EVALUATION_SEED, ImageTask, Sampler, sampler_name
from mfd_fast.run.folder import RunFolder

BLOCKS = r"blocks\.\d+"


class DigitsTask(ImageTask):
    """See ``run.task.Task``.  The condition of a sample is its class, an int64."""

    TITLE, NO_PROMPTS, COLUMNS = "digits", "digits have classes, not prompts", COLUMNS
    load, save = load_dit, save_dit

    def load_teacher(self) -> nn.Module:
        return load_teacher(self.config.teacher or None)

    def files(self) -> dict[str, str]:
        load_digits()  # what samples are compared with
        return {}

    def remarks(self, num_samples: int) -> list[str]:
        return few_samples(num_samples, NUM_FEATURES)

    def null_cond(self, label: Tensor) -> Tensor:
        """The class of unconditional samples."""
        return torch.full_like(label, self.teacher.config.num_classes)

    def backbone(self) -> CopiedBackbone:
        backbone = super().backbone()
        apply_activation_policy(backbone.student, self.config.train.activation, BLOCKS)
        return backbone

    def condition(self, num: int) -> Tensor:
        return torch.arange(num, device=self.device) % NUM_CLASSES

    def drawn(self, batch: int) -> Callable[[Generator], Tensor]:
        classes = self.teacher.config.num_classes

        def labels(generator: Generator) -> Tensor:
            return to_device(torch.randint(classes, (batch,), generator=generator), self.device)

        return labels

    def drawn_with_data(self, batch: int) -> Callable[[Generator], tuple[Tensor, Tensor]]:
        images, labels = (part.to(self.device) for part in load_digits())

        def examples(generator: Generator) -> tuple[Tensor, Tensor]:
            rows = to_device(torch.randint(len(images), (batch,), generator=generator), self.device)
            return images[rows], labels[rows]

        return examples

    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        teacher = teacher_samplers(self.teacher, self.config.distill.guidance)
        return evaluate_digits(
            teacher | self.student_sampler(run),
            classifier=load_classifier().to(self.device),
            reference=sampler_name("teacher", TEACHER_STEPS[0]),
            num_samples=num_samples,
            seed=EVALUATION_SEED,
        )

    def shown(self, run: RunFolder) -> dict[str, Sampler]:
        teacher = teacher_samplers(self.teacher, self.config.distill.guidance)
        one, many = (sampler_name("teacher", steps) for steps in (1, TEACHER_STEPS[0]))
        rows = {one: teacher[one], **self.student_sampler(run), many: teacher[many]}
        return {"noise": lambda noise, cond: noise, **rows}
