"""Frechet distance between two sets of features, each taken as a Gaussian.

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

Dowson and Landau (1982); Heusel et al. (2017) call it FID on Inception features.  The trace of the
root needs no general matrix square root: with symmetric roots it is the sum of the singular values
of C_a^(1/2) C_b^(1/2), which stays accurate when a covariance has rank below D.
"""

import torch
from torch import Tensor

from mfd_fast.metrics.checks import check_same_width, checked_features


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between ``[N, D]`` and ``[M, D]``, in units of features squared.

    Computed in float64 with unbiased covariances.  Symmetric; 0 for equal sets.  With few samples
    it is biased upwards: compare only numbers from equally many samples.

    Raises:
        ValueError: wrong shapes, fewer than two samples, or values that are not finite.
    """
    a = checked_features(features_a, "frechet_distance: features_a", at_least=2)
    b = checked_features(features_b, "frechet_distance: features_b", at_least=2)
    check_same_width(a, b, "frechet_distance: features_a and features_b")
    return frechet_from_moments(
        a.mean(0), torch.atleast_2d(a.T.cov()), b.mean(0), torch.atleast_2d(b.T.cov())
    )


def frechet_from_moments(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """Squared Frechet distance of two Gaussians: means ``[D]``, covariances ``[D, D]``."""
    covariance_a, covariance_b = covariance_a.double(), covariance_b.double()
    root = symmetric_root(covariance_a) @ symmetric_root(covariance_b)
    between_means = (mean_a.double() - mean_b.double()).square().sum()
    traces = covariance_a.trace() + covariance_b.trace()
    distance = between_means + traces - 2 * torch.linalg.svdvals(root).sum()
    return distance.clamp_min(0).item()


def symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a positive semi-definite ``[D, D]``; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
