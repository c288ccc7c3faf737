"""The check that every metric makes of its features."""

import torch
from torch import Tensor


def checked_features(features: Tensor, name: str, *, at_least: int) -> Tensor:
    """``features`` as float64 without gradient, once it is ``[N, D]``, finite and long enough.

    Args:
        features: floating point ``[N, D]``.
        name: how the caller calls it, for the message.
        at_least: the fewest rows that the metric is defined for.

    Raises:
        ValueError: another shape, an integer dtype, too few rows, or a value that is not finite.
    """
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point features of shape [N, D]; "
            f"got {features.dtype} of shape {list(features.shape)}; flatten each sample to one row"
        )
    if features.shape[0] < at_least:
        raise ValueError(
            f"{name}: expected at least {at_least} samples, got {features.shape[0]}; draw more"
        )
    if not torch.isfinite(features).all():
        raise ValueError(
            f"{name}: expected finite features, got "
            f"{int((~torch.isfinite(features)).sum())} values that are infinite or NaN; "
            f"look at the samples before measuring them"
        )
    return features.detach().double()


def check_same_width(a: Tensor, b: Tensor, names: str) -> None:
    """``ValueError`` unless ``a`` and ``b`` have the same number of features."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names}: expected the same number of features, got {a.shape[1]} and {b.shape[1]}; "
            f"use one feature network for both"
        )
