"""Two-dimensional toy distributions, drawn on demand; each has unit order of size.

gaussian_mixture    eight round Gaussians on a circle
two_moons           two interleaved half circles with noise
checkerboard        uniform on the dark squares of a 4 x 4 board
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

NUM_MODES = 8
MODE_RADIUS = 2.0
MODE_STD = 0.15
MOON_STD = 0.08
BOARD_SIDE = 4  # squares


def sample_toy(name: str, size: int, generator: Generator) -> Tensor:
    """``[size, 2]`` float32 samples of the toy ``name``; ``ValueError`` lists the toys."""
    if name not in TOYS:
        raise ValueError(f"toy must be one of {sorted(TOYS)}, got {name!r}")
    return TOYS[name](size, generator)


def mode_centres() -> Tensor:
    """Centres ``[8, 2]`` of the Gaussian mixture."""
    angle = 2 * math.pi * torch.arange(NUM_MODES) / NUM_MODES
    return MODE_RADIUS * torch.stack((angle.cos(), angle.sin()), dim=1)


def mixture_velocity(x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
    """The exact velocity of the noised Gaussian mixture at x ``[B, 2]``, t ``[B]`` in (0, 1].

    The mean of the modes' velocities, each that of a Gaussian (method.md section 7), weighted by
    how likely x is under each.  shift ``[2]`` moves the mixture.
    """
    centres = mode_centres().to(x.dtype) + (0 if shift is None else shift.to(x.dtype))
    time = t.to(x.dtype)[:, None, None]
    offset = x[:, None] - (1 - time) * centres  # [B, 8, 2]
    variance = (1 - time) ** 2 * MODE_STD**2 + time**2
    weight = torch.softmax(-offset.square().sum(-1) / (2 * variance[..., 0]), dim=1)
    rate = (time - (1 - time) * MODE_STD**2) / variance
    return (weight[..., None] * (rate * offset - centres)).sum(1)


def _gaussian_mixture(size: int, generator: Generator) -> Tensor:
    mode = torch.randint(NUM_MODES, (size,), generator=generator)
    return mode_centres()[mode] + MODE_STD * torch.randn(size, 2, generator=generator)


def _two_moons(size: int, generator: Generator) -> Tensor:
    angle = math.pi * torch.rand(size, generator=generator)
    side = 1 - 2 * torch.randint(2, (size,), generator=generator).float()  # 1: above, -1: below
    moon = torch.stack((side * angle.cos() - side / 2, side * angle.sin() - side / 4), dim=1)
    return moon + MOON_STD * torch.randn(size, 2, generator=generator)


def _checkerboard(size: int, generator: Generator) -> Tensor:
    column = torch.randint(BOARD_SIDE, (size,), generator=generator)
    row = 2 * torch.randint(BOARD_SIDE // 2, (size,), generator=generator) + column % 2
    corner = torch.stack((column, row), dim=1) - BOARD_SIDE / 2
    return corner + torch.rand(size, 2, generator=generator)


TOYS: dict[str, Callable[[int, Generator], Tensor]] = {
    "gaussian_mixture": _gaussian_mixture,
    "two_moons": _two_moons,
    "checkerboard": _checkerboard,
}
