"""Cases with a closed form for the objectives that MFD is compared with."""

from contextlib import nullcontext

import torch
from gaussian import GaussianFlow
from torch import Generator, nn

from mfd_fast import CopiedBackbone
from mfd_fast.baselines.batch import Batch, Fields
from mfd_fast.baselines.config import ComparisonConfig
from mfd_fast.baselines.objectives import make_objective

DIM = 3
FLOW = GaussianFlow(mean=0.3, std=0.5)


class ExactVelocity(nn.Module):
    """The velocity of ``FLOW``; the condition does not matter."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, cond):
        return FLOW.velocity(x, t)


class ExactFlowMap(nn.Module):
    """F(x, t, s) = average velocity of ``FLOW`` between s and t, times (1 + error)."""

    def __init__(self, error=0.0):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t, cond, end):
        return (1 + self.error) * FLOW.mean_velocity(x, t, end)


class ExactJump(nn.Module):
    """F(x, t) = (x - sample at the end of the trajectory through x) / t, times (1 + error)."""

    def __init__(self, error=0.0):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t, cond):
        t = t.clamp_min(1e-6)  # at t = 0 any F will do: it is multiplied by 0
        return (1 + self.error) * FLOW.mean_velocity(x, t, torch.zeros_like(t))


def exact_backbone(student, teacher=None, aux=None):
    """float64 copies; the teacher is ``FLOW`` if None."""
    return CopiedBackbone(
        teacher or ExactVelocity(), auxiliary=aux, student=student, sample_shape=(DIM,)
    )


def data(size, seed=0):
    """Samples of ``FLOW``, ``[size, DIM]`` float64."""
    draw = torch.randn(size, DIM, dtype=torch.float64, generator=Generator().manual_seed(seed))
    return FLOW.mean + FLOW.std * draw


def make_case(name, student, size=16, teacher=None, aux=None, update=0, **settings):
    """The objective, bound to a backbone, and one batch of data; times are float64 too."""
    config = ComparisonConfig(objective=name, guidance=1.0, **settings)
    objective = make_objective(config)
    backbone = exact_backbone(student, teacher, aux)
    objective.bind(backbone, None)
    generator = Generator().manual_seed(1)
    batch = Batch(
        fields=Fields(backbone, backbone.prepare(torch.zeros(size, 1)), 1.0),
        data=data(size),
        noise=lambda: torch.randn(size, DIM, dtype=torch.float64, generator=generator),
        host=Generator().manual_seed(2),
        update=update,
        averaged=nullcontext,
        size=size,
        device=torch.device("cpu"),
    )
    return objective, batch


def rounding(*values):
    """What float64 rounding can leave of a difference of ``values``: 100 operations of the largest
    one."""
    largest = max(value.detach().abs().max() for value in values)
    return 100 * torch.finfo(torch.float64).eps * largest.clamp_min(1.0)
