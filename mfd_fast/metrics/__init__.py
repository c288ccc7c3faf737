"""Distances between sets of samples, on any features ``[N, D]``."""

from mfd_fast.metrics.frechet import frechet_distance, frechet_from_moments
from mfd_fast.metrics.manifold import precision_recall

__all__ = ["frechet_distance", "frechet_from_moments", "precision_recall"]
