"""How good are samples of digits: Frechet distances, precision, recall, class accuracy, speed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from mfd_fast.metrics import frechet_distance, precision_recall
from mfd_fast.models.digits.classifier import NUM_CLASSES, DigitsClassifier
from mfd_fast.models.digits.data import load_digits
from mfd_fast.models.digits.dit import DiT
from mfd_fast.models.images import Sampler, TeacherSampler, draw_images, sampler_name
from mfd_fast.run.console import progress
from mfd_fast.run.table import markdown_table

TEACHER_STEPS = (50, 10, 5, 2, 1)
# Far from any seed of a run, so that the reference set shares no noise with the rows.
REFERENCE_SEED_OFFSET = 1_000_003

# Column of the printed table: title, key of the row, format.
COLUMNS = (
    ("sampler", "name", "s"),
    ("NFE", "nfe", "d"),
    ("FD teacher", "frechet_to_teacher50", ".2f"),
    ("FD data", "frechet_to_data", ".2f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("samples/s", "samples_per_s", ".0f"),
)


def teacher_samplers(teacher: DiT, guidance: float) -> dict[str, TeacherSampler]:
    """The guided teacher at ``TEACHER_STEPS``, by name; the first is the usual reference."""
    return {
        sampler_name("teacher", steps): TeacherSampler(teacher, steps, guidance)
        for steps in TEACHER_STEPS
    }


def evaluate_digits(
    samplers: Mapping[str, Sampler],
    *,
    classifier: DigitsClassifier,
    reference: str,
    num_samples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure every sampler on the same noise and the same, balanced labels.

    Args:
        samplers: name -> callable(noise ``[B, 1, 8, 8]``, labels ``[B]``) -> images like the noise.
            Its attribute ``nfe`` fills that column; None without one.
        classifier: its features carry all distances; its device is where samples are drawn.
        reference: the sampler (the 50-step teacher) that also draws a second set from other noise.
            ``frechet_to_teacher50`` compares every row with this second set, so that the number of
            the reference's own row is the noise floor.
        num_samples: samples of a row; Frechet distances of different numbers do not compare.
        seed: of the noise.

    Returns:
        One dict a sampler: ``name``, ``nfe``, ``frechet_to_teacher50``, ``frechet_to_data``,
        ``precision`` and ``recall`` against the 1,797 digits, ``accuracy`` (share whose class the
        classifier finds), ``samples_per_s``.

    Images are clamped to [-1, 1], the range of the data, before they are measured.

    Raises:
        ValueError: ``reference`` is not one of ``samplers``.
    """
    if reference not in samplers:
        raise ValueError(
            f"evaluate_digits: reference must be one of {list(samplers)}, got {reference!r}"
        )
    yardstick = Yardstick(classifier, samplers[reference], num_samples=num_samples, seed=seed)
    shown = progress(samplers.items(), "evaluating")
    return [yardstick.row(name, sampler) for name, sampler in shown]


class Yardstick:
    """What samplers are measured against, drawn once: see ``evaluate_digits`` for arguments."""

    @torch.no_grad()
    def __init__(
        self, classifier: DigitsClassifier, reference: Sampler, *, num_samples: int, seed: int
    ):
        device = next(classifier.parameters()).device
        self.classifier = classifier
        self.labels = torch.arange(num_samples, device=device) % NUM_CLASSES
        self.data = classifier.features(load_digits()[0].to(device))
        noise = draw_noise(num_samples, seed + REFERENCE_SEED_OFFSET, device)
        self.teacher = classifier.features(draw_images(reference, noise, self.labels)[0])
        self.noise = draw_noise(num_samples, seed, device)

    @torch.no_grad()
    def row(self, name: str, sampler: Sampler) -> dict[str, Any]:
        """One row of ``evaluate_digits``."""
        images, seconds = draw_images(sampler, self.noise, self.labels)
        features = self.classifier.features(images)
        manifold = precision_recall(self.data, features)
        agrees = self.classifier.logits(features).argmax(1) == self.labels
        return {
            "name": name,
            "nfe": getattr(sampler, "nfe", None),
            "frechet_to_teacher50": frechet_distance(features, self.teacher),
            "frechet_to_data": frechet_distance(features, self.data),
            "precision": manifold.precision,
            "recall": manifold.recall,
            "accuracy": agrees.double().mean().item(),
            "samples_per_s": len(images) / seconds,
        }


def draw_noise(num_samples: int, seed: int, device: torch.device | str) -> Tensor:
    """Standard normal ``[num_samples, 1, 8, 8]``, the same on every device."""
    generator = Generator().manual_seed(seed)
    return torch.randn(num_samples, 1, 8, 8, generator=generator).to(device)


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of ``evaluate_digits`` as a Markdown table."""
    return markdown_table(rows, COLUMNS)
