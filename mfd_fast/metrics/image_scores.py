"""Scores of images for their prompts, by name: the columns of a text-to-image table."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mfd_fast.metrics.clip_scores import (
    AestheticScore,
    load_clip_score,
    load_hps_score,
    load_pick_score,
)
from mfd_fast.metrics.image_reward import ImageReward
from mfd_fast.metrics.pretrained import check_images

Score = Callable[[Tensor, Sequence[str]], Tensor]  # images, prompts -> [N] on the CPU

SCORES: dict[str, Callable[..., Score]] = {
    "aesthetic": AestheticScore,
    "pick": load_pick_score,
    "hps": load_hps_score,
    "reward": ImageReward,
    "clip": load_clip_score,
}
"""Name -> what loads the score: ``SCORES[name](model, file, device=...)``."""


def load_scores(sources: Mapping[str, str], *, device: torch.device | str) -> dict[str, Score]:
    """The scores of these names, their weights on the CPU until they are used.

    Args:
        sources: name -> ``MODEL`` or ``MODEL:FILE``; MODEL is a folder or an id of the hub, FILE
            the weights that come as a file of their own.
        device: where they are computed.

    Raises:
        ValueError: an unknown name, or a file that is not what the score needs.
        OSError: a file or model that is missing.
        ImportError: says what to install.
    """
    if unknown := sources.keys() - SCORES.keys():
        raise ValueError(f"unknown score {min(unknown)!r}; there is {list(SCORES)}")
    loaded = {}
    for name, source in sources.items():
        model, _, file = source.partition(":")
        loaded[name] = SCORES[name](model, file, device=device)
    return loaded


def score_images(
    images: Tensor, prompts: Sequence[str], scores: Mapping[str, Score]
) -> dict[str, float]:
    """The mean of every score over pairs of image and prompt, by its name.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        prompts: N of them; without influence on ``aesthetic``.
        scores: from :func:`load_scores`.

    ``ValueError``: wrong images, or another number of prompts.
    """
    check_images(images)
    if len(prompts) != len(images):
        raise ValueError(
            f"expected a prompt for each of the {len(images)} images, got {len(prompts)} prompts"
        )
    return {name: score(images, prompts).double().mean().item() for name, score in scores.items()}
