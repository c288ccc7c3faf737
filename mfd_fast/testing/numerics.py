"""The one tolerance rule of the project."""

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 2.0
) -> None:
    """``actual`` may be at most ``factor`` times as wrong as eager PyTorch in the same dtype.

    ``exact`` is the float64 reference, ``eager`` the same reference run in the kernel's dtype.
    Nobody picks an atol: the yardstick is what the user would get without the kernel.
    """
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape == exact.shape
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "non-finite values (or elements never written)"
    scale = exact.abs().max().clamp_min(1e-30)
    ours = ((actual.double() - exact).abs().max() / scale).item()
    theirs = ((eager.double() - exact).abs().max() / scale).item()
    floor = torch.finfo(actual.dtype).eps
    assert ours <= factor * theirs + floor, (
        f"relative error {ours:.3e} > {factor} * eager error {theirs:.3e} + eps {floor:.1e}"
    )
