"""The closed form that tests hold on to: the flow of Gaussian data N(mean, std^2 I).

The exact flow keeps (x - (1-t) m) / sqrt((1-t)^2 s^2 + t^2) constant; its velocity is the
derivative of that, written so that it is finite at t = 0 too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianFlow:
    mean: float = 0.3
    std: float = 0.5

    def _column(self, t: Tensor, x: Tensor) -> Tensor:
        return t.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))

    def scale(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        t = self._column(t, x)
        rate = (t - (1 - t) * self.std**2) / self.scale(t) ** 2  # d log scale / dt
        return -self.mean + rate * (x - (1 - t) * self.mean)

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = self._column(t, x), self._column(r, x)
        standard = (x - (1 - t) * self.mean) / self.scale(t)
        return standard * self.scale(r) + (1 - r) * self.mean

    def mean_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (x - self.flow_map(x, t, r)) / self._column(t - r, x)


class GaussianNetwork(torch.nn.Module):
    """A network whose velocity is that of N(mean, std^2 I), mean and log std learnable per
    dimension.
    """

    def __init__(self, mean: float = 0.3, std: float = 0.5, dim: int = 3):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.full((dim,), mean))
        self.log_std = torch.nn.Parameter(torch.full((dim,), std).log())

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t = t.to(x.dtype).view(-1, 1)
        variance = (2 * self.log_std).exp()
        rate = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
        return -self.mean + rate * (x - (1 - t) * self.mean) + 0.0 * cond
