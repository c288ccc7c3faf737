"""The columns of a text-to-image table: how well a SANA run's images are liked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mfd_fast.metrics.frechet import frechet_distance
from mfd_fast.metrics.image_features import DinoFeatures
from mfd_fast.metrics.image_scores import SCORES, load_scores, score_images
from mfd_fast.run.config import nearest

FID = "fid"
NAMES = (*SCORES, FID)

# Column of the printed table: title, key of the row, format.
COLUMNS = (
    ("Aesthetic Score", "aesthetic", ".3f"),
    ("PickScore", "pick", ".4f"),
    ("HPSv2", "hps", ".4f"),
    ("ImageReward", "reward", ".4f"),
    ("CLIP Score", "clip", ".3f"),
    ("FID (DINOv2)", FID, ".2f"),
)


def parse_sources(text: str) -> dict[str, str]:
    """``NAME=MODEL,NAME=MODEL:FILE`` as a dict; ``ValueError`` names what is wrong in it."""
    sources: dict[str, str] = {}
    for part in text.split(","):
        name, _, source = part.strip().partition("=")
        if name not in NAMES:
            raise ValueError(
                f"unknown score {name!r}; there is {list(NAMES)}{nearest(name, NAMES)}"
            )
        if not source or name in sources:
            raise ValueError(f"expected {name}=MODEL or {name}=MODEL:FILE once, got {text!r}")
        sources[name] = source
    return sources


class SanaScores:
    """Scores of one row of the table after the other; the first row is what FID compares with.

    Args:
        sources: from :func:`parse_sources`; a column without one stays empty.
        device: where scores are computed.

    ``OSError``, ``ValueError`` or ``ImportError`` names a model that cannot be used.
    """

    def __init__(self, sources: Mapping[str, str], *, device: torch.device):
        text = {name: source for name, source in sources.items() if name != FID}
        self._scores = load_scores(text, device=device)
        self._features = DinoFeatures(sources[FID], device=device) if FID in sources else None
        self._reference: Tensor | None = None

    def row(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """A value for every column, None for those without a model and the first row's FID.

        Args:
            images: uint8 ``[N, 3, H, W]``.
            prompts: what they were made for.
        """
        row: dict[str, Any] = {key: None for _, key, _ in COLUMNS}
        row |= score_images(images, prompts, self._scores)
        if self._features is not None:
            features = self._features(images)
            if self._reference is None:
                self._reference = features
            else:
                row[FID] = frechet_distance(self._reference, features)
        return row
