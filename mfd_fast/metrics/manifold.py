"""Precision and recall of a generative model by nearest-neighbour manifolds.

Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019).
The manifold of a set is the union of balls, one around each sample, that reach its k-th nearest
neighbour.  Precision is the share of fakes inside the real manifold, recall the share of real
samples inside the fake one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mfd_fast.metrics.checks import check_same_width, checked_features

# Distances held at once: 2^22 float64 values are 32 MiB, whatever the number of samples.
MAX_DISTANCES = 2**22


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Precision and recall of ``fake`` ``[M, D]`` against ``real`` ``[N, D]``.

    Time grows as (N + M)^2 D, memory as N + M.  Both numbers depend on the number of samples:
    compare only equal sizes.

    Args:
        real: features of data.
        fake: features of generated samples.
        k: the neighbour that sets the radius of a ball; 3 in the paper.

    Raises:
        ValueError: wrong shapes, ``k`` below 1, or a set with no k-th neighbour.
    """
    if k < 1:
        raise ValueError(f"precision_recall: k must be >= 1, got {k}")
    real = checked_features(real, "precision_recall: real", at_least=k + 1)
    fake = checked_features(fake, "precision_recall: fake", at_least=k + 1)
    check_same_width(real, fake, "precision_recall: real and fake")
    # Distances do not change, and small numbers lose fewer digits in |a|^2 + |b|^2 - 2 a b.
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    return PrecisionRecall(
        precision=_share_inside(fake, real, k), recall=_share_inside(real, fake, k)
    )


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of ``points`` that lie in at least one ball of ``centres``; the border is inside."""
    squared_radii = torch.cat(
        # Each sample is its own nearest neighbour, so the k-th other one is number k + 1.
        [distances.kthvalue(k + 1, dim=1).values for distances in _distance_rows(centres, centres)]
    )
    inside = [(rows <= squared_radii).any(1) for rows in _distance_rows(points, centres)]
    return torch.cat(inside).double().mean().item()


def _distance_rows(a: Tensor, b: Tensor):
    """Squared distances from ``a`` to all of ``b``, some rows at a time.

    What is below the rounding error of the matmul counts as zero, so that equal samples are
    at distance zero exactly.
    """
    rounding = a.shape[1] * torch.finfo(a.dtype).eps
    squares_b = b.square().sum(1)
    for rows in a.split(max(1, MAX_DISTANCES // b.shape[0])):
        squares = rows.square().sum(1, keepdim=True) + squares_b
        distances = torch.addmm(squares, rows, b.T, alpha=-2)
        yield torch.where(distances > rounding * squares, distances, 0.0)
