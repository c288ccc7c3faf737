"""A small convolutional classifier of the 8x8 digits: features to measure samples with."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.files.weights import check_fit, load_weights, save_weights

NUM_CLASSES = 10
NUM_FEATURES = 64
HELD_OUT = 360  # of 1,797 images

# Augmentation: what a careful hand could have written instead.
MAX_ANGLE_RAD = math.radians(12.0)
MAX_SHIFT_PIXELS = 0.6
MAX_LOG_SCALE = 0.1
NOISE_STD = 0.1


class DigitsClassifier(nn.Module):
    """Images ``[B, 1, 8, 8]`` in [-1, 1] to logits ``[B, 10]``, by way of 64 features."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, NUM_FEATURES),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations ``[B, 64]``, before their non-linearity."""
        return self.trunk(images)

    def logits(self, features: Tensor) -> Tensor:
        """Features ``[B, 64]`` to class logits ``[B, 10]``."""
        return self.head(F.silu(features))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, shift, scale and noise each image ``[B, 1, H, W]`` a little; background -1."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(images.shape[0], generator=generator) - 1) * limit

    angle, scale = uniform(MAX_ANGLE_RAD), uniform(MAX_LOG_SCALE).exp()
    shift_x, shift_y = (uniform(2 * MAX_SHIFT_PIXELS / images.shape[-1]) for _ in range(2))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack((cos, -sin, shift_x, sin, cos, shift_y), dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + NOISE_STD * torch.randn(images.shape, generator=generator)


def train_classifier(
    images: Tensor, labels: Tensor, *, updates: int, batch_size: int, lr: float, seed: int
) -> tuple[DigitsClassifier, dict[str, float]]:
    """Train on all but ``HELD_OUT`` images, which are drawn by ``seed`` and never trained on.

    Args:
        images: ``[N, 1, 8, 8]`` in [-1, 1].
        labels: ``[N]`` int64.
        updates: number of optimiser steps.
        batch_size: images in a step.
        lr: largest learning rate of the one-cycle schedule.
        seed: of the split, the initial weights and the batches.

    Returns:
        The classifier in eval mode, and ``held_out_accuracy``, ``held_out_images``,
        ``final_loss``.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, kept = order[:HELD_OUT], order[HELD_OUT:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=updates)
    loss = torch.zeros(())
    for _ in range(updates):
        batch = kept[torch.randint(len(kept), (batch_size,), generator=generator)]
        logits = classifier(augment(images[batch], generator))
        loss = F.cross_entropy(logits, labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    classifier.eval()
    with torch.no_grad():
        correct = classifier(images[held_out]).argmax(1) == labels[held_out]
    return classifier, {
        "held_out_accuracy": correct.double().mean().item(),
        "held_out_images": len(held_out),
        "final_loss": loss.item(),
    }


def save_classifier(
    classifier: DigitsClassifier, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the weights and ``metadata`` (JSON values) to one safetensors file, atomically."""
    save_weights(classifier, path, kind="classifier", config={}, metadata=metadata or {})


def read_classifier(path: str | Path) -> DigitsClassifier:
    """Read what ``save_classifier`` wrote; errors as in ``load_dit``."""
    tensors, _, _ = load_weights(path, kind="classifier")
    classifier = DigitsClassifier()
    check_fit(classifier, tensors, path)
    classifier.load_state_dict(tensors)
    return classifier.eval()
