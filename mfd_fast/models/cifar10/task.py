"""The ``cifar10`` preset: an unconditional UNet teacher, distilled into few steps (paper D.1)."""

from collections.abc import Callable
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mfd_fast.flow.solvers import to_device
from mfd_fast.metrics.image_features import FEATURES, distribution_scores, few_samples
from mfd_fast.models.cifar10.data import load_cifar10, to_unit_range
from mfd_fast.models.cifar10.unet import load_unet, save_unet
from mfd_fast.models.images import (
    EVALUATION_SEED,
    ImageTask,
    Sampler,
    TeacherSampler,
    draw_images,
    sampler_name,
)
from mfd_fast.run.folder import RunFolder


class Cifar10Task(ImageTask):
    """See ``run.task.Task``.  The condition of a sample is an empty row."""

    TITLE, NO_PROMPTS = "CIFAR-10", "CIFAR-10 runs are unconditional"
    load, save = load_unet, save_unet
    COLUMNS = (
        ("sampler", "name", "s"),
        ("NFE", "nfe", "d"),
        ("FID", "fid", ".2f"),
        ("precision", "precision", ".3f"),
        ("recall", "recall", ".3f"),
        ("images/s", "samples_per_s", ".1f"),
    )

    def load_teacher(self) -> nn.Module:
        settings = self.config.cifar10
        if not self.config.teacher:
            raise ValueError(
                "cifar10 has no packaged teacher: train one with mfd-fast pretrain cifar10 and "
                "give its file with --teacher"
            )
        if settings.features != "none" and not settings.features_model:
            raise ValueError(f"cifar10.features={settings.features} needs cifar10.features_model")
        return load_unet(self.config.teacher)

    def files(self) -> dict[str, str]:
        settings, found = self.config.cifar10, {}
        if self.uses_data or settings.features != "none":
            found["data"] = f"{settings.data}, {len(self._images())} images"
        if settings.features != "none":
            found["features"] = f"{settings.features}, {self._features.size} components"
        return found

    def data(self) -> str:
        return blake2b(self._images().numpy().data).hexdigest() if self.uses_data else ""

    def remarks(self, num_samples: int) -> list[str]:
        if self.config.cifar10.features == "none":
            return []
        return few_samples(num_samples, self._features.size)

    def condition(self, num: int) -> Tensor:
        return torch.empty(num, 0, device=self.device)

    def drawn(self, batch: int) -> Callable[[Generator], Tensor]:
        empty = self.condition(batch)
        return lambda generator: empty

    def drawn_with_data(self, batch: int) -> Callable[[Generator], tuple[Tensor, Tensor]]:
        images, empty = self._images(), self.condition(batch)

        def examples(generator: Generator) -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(images), (batch,), generator=generator)
            return to_unit_range(to_device(images[rows], self.device)), empty

        return examples

    @torch.no_grad()
    def evaluate(self, run: RunFolder, num_samples: int) -> list[dict[str, Any]]:
        """FID, precision and recall against the training images, if there are features."""
        features = reference = None
        if self.config.cifar10.features != "none":
            features = self._features
            reference = features(self._images())
        noise, cond = self.noise(num_samples, EVALUATION_SEED)
        rows = []
        for name, sampler in (self._teacher_sampler() | self.student_sampler(run)).items():
            images, seconds = draw_images(sampler, noise, cond)
            scores = dict.fromkeys(("fid", "precision", "recall"))
            if features:
                scores = distribution_scores(reference, features(to_bytes(images)))
            speed = {"samples_per_s": num_samples / seconds}
            rows.append({"name": name, "nfe": sampler.nfe, **scores, **speed})
        return rows

    def shown(self, run: RunFolder) -> dict[str, Sampler]:
        return self.student_sampler(run) | self._teacher_sampler()

    @cached_property
    def _features(self) -> Any:
        settings = self.config.cifar10
        return FEATURES[settings.features](settings.features_model, device=self.device)

    def _images(self) -> Tensor:
        if not self.config.cifar10.data:
            raise ValueError("give the folder of the CIFAR-10 archive with --cifar10.data")
        return load_cifar10(self.config.cifar10.data)[0]

    def _teacher_sampler(self) -> dict[str, TeacherSampler]:
        steps = self.config.cifar10.teacher_steps
        return {sampler_name("teacher", steps): TeacherSampler(self.teacher, steps)}


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
