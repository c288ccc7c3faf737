"""What OccFM's transition network knows of position, time and ego motion before it learns.

Letters in shapes: R rows, P positions, F frames.
"""

import torch
from torch import Tensor

MAX_PERIOD = 10_000.0
TIMESTEPS = 1000.0  # the time embedding sees tau = 1000 t
TRAJECTORY_BASE = 100.0
BIAS_ROWS = 32
FUTURE_ROWS = 16  # the first row of the bias table for keys after the query
MAX_FRAMES = 12  # with more, distances would share rows of the bias table


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """``[sin(p w_0 ..), cos(p w_0 ..)]``, w_j = 10000^(-j / (width / 2)); ``[P]`` to float64
    ``[P, width]``.
    """
    half = width // 2
    frequencies = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_table(grid: int, width: int) -> Tensor:
    """``[1, grid^2, width]`` float32: half the channels are the column's sinusoid, half the row's.

    The published table counts rows of grid + 1 columns although the tokens have grid, and so do
    the weights that were trained with it.
    """
    token = torch.arange(grid * grid)
    row, column = token // (grid + 1), token % (grid + 1)
    parts = [sinusoid(column, width // 2), sinusoid(row, width // 2)]
    return torch.cat(parts, dim=1)[None].float()


def frame_table(frames: int, width: int) -> Tensor:
    """``[1, F, width]`` float32, the sinusoid of the frame's number."""
    return sinusoid(torch.arange(frames), width)[None].float()


def time_features(tau: Tensor, width: int) -> Tensor:
    """``[cos, sin]`` (in this order) of tau w_j, w as in :func:`sinusoid`; ``[R, width]`` float32.

    tau is 1000 t, ``[R]``.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=tau.device) * (-1.0 / half)
    angles = tau.float()[:, None] * MAX_PERIOD**exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def trajectory_features(steps: Tensor, frequencies: int) -> Tensor:
    """Sine and cosine of ego steps in metres ``[R, L, 2]`` at frequencies 100^(k / K).

    Feature 4 k + 2 s + c of a step: coordinate c, s = 0 sine and 1 cosine; ``[R, 4 K L]`` float32.
    """
    exponents = torch.arange(frequencies, dtype=torch.float32, device=steps.device) / frequencies
    angles = steps.float()[:, :, None] * (TRAJECTORY_BASE**exponents)[:, None]
    return torch.stack([angles.sin(), angles.cos()], dim=3).flatten(1)


def bias_rows(frames: int) -> Tensor:
    """Which row of the bias table query i and key j use, ``[F, F]``: |i - j|, + 16 if j > i."""
    frame = torch.arange(frames)
    distance = frame[:, None] - frame
    return distance.abs() + FUTURE_ROWS * (distance < 0)
