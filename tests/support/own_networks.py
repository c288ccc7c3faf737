"""Networks as people bring them, small: buffers, dropout, own checkpoints, tied parameters."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mfd_fast import CopiedBackbone, DistillConfig, Distiller, OptimConfig

DIM, COND, WIDTH = 2, 4, 16


class Plain(nn.Module):
    """``last(act(first([x, t, cond])))``; subclasses change one thing."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(DIM + 1 + COND, WIDTH), nn.Linear(WIDTH, DIM)

    def inner(self, h):
        return torch.relu(self.first(h))

    def forward(self, x, t, cond):
        h = torch.cat([x, t[:, None].to(x.dtype), cond.to(x.dtype)], dim=1)
        return self.last(self.inner(h))


class SpectralNorm(Plain):
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(self.first)


class BatchNorm(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def inner(self, h):
        return torch.relu(self.norm(self.first(h)))


class ComplexBuffer(Plain):
    """A running phase, complex, beside a cache that is no state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.ones(WIDTH, dtype=torch.complex64))
        self.register_buffer("cache", torch.zeros(()), persistent=False)

    def inner(self, h):
        h = self.first(h)
        if self.training:
            self.phase.mul_(torch.polar(torch.ones(WIDTH), 0.1 * h.detach().mean(0)))
        return torch.relu(h * self.phase.real)


class Dropout(Plain):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def inner(self, h):
        return self.drop(super().inner(h))


class WeightNorm(Plain):
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(self.first)


class Fixed(Plain):
    """A table that is not trained, and integers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(0, 1, WIDTH), requires_grad=False)
        self.codes = nn.Parameter(torch.arange(WIDTH, dtype=torch.int8), requires_grad=False)

    def inner(self, h):
        return torch.relu(self.first(h) + self.table + self.codes.to(h.dtype) / WIDTH)


class Tied(Plain):
    """Two layers, one weight."""

    def __init__(self):
        super().__init__()
        self.second, self.third = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third.weight = self.second.weight

    def inner(self, h):
        return torch.relu(self.third(torch.tanh(self.second(super().inner(h)))))


class Checkpointed(Plain):
    """Two blocks, checkpointed by the network itself unless ``reentrant`` is None."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )
        self.reentrant = reentrant

    def inner(self, h):
        h = self.first(h)
        for block in self.blocks:
            if self.reentrant is None:
                h = h + block(h)
            else:
                h = h + checkpoint(block, h, use_reentrant=self.reentrant)
        return h


class ByWeight(Plain):
    """``last`` is used through its weight alone: always, or only without gradient."""

    def __init__(self, only_without_grad=False):
        super().__init__()
        self.only_without_grad = only_without_grad

    def forward(self, x, t, cond):
        h = self.inner(torch.cat([x, t[:, None], cond], dim=1))
        if self.only_without_grad and torch.is_grad_enabled():
            return self.last(h)
        return F.linear(h, self.last.weight, self.last.bias)


def make(network, cls=Distiller, *args, **kwargs):
    """A distiller of full copies."""
    torch.manual_seed(0)
    options = {"guidance": 2.0, "step_size": 0.25, "aux_updates": 1} | kwargs
    backbone = CopiedBackbone(network, sample_shape=(DIM,), null_cond=torch.zeros_like)
    optim = OptimConfig(lr=1e-2)
    return cls(backbone, DistillConfig(student_optim=optim, aux_optim=optim, **options), *args)


def assert_same(one, two):
    """Equal tensors under every key of the first."""
    assert all(torch.equal(one[key], two[key]) for key in one)


def conds(count, batch=8):
    """Conditions of some updates."""
    return [torch.randn(batch, COND) for _ in range(count)]
