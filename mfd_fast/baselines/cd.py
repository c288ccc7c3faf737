"""Consistency distillation (Song et al., "Consistency Models", 2023, Algorithm 2), for flows.

    f(x, t) = x - t F(x, t)                       the sample at the end of the trajectory through x
    loss    = d( f(x_{n+1}, t_{n+1}), sg f_ema(x_n, t_n) )

x_{n+1} is the data noised to t_{n+1}, drawn uniformly from ceil(1/h) even nodes; x_n is one solver
step of the guided teacher away, as in that paper (18 nodes of Heun's steps on CIFAR-10; here the
run's own solver and h, so that all methods see one teacher).  f(x, 0) = x holds by itself.  d is
the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(dim) (Song and Dhariwal
2023), or L2.  K-step sampling noises the sample again.
"""

import math

import torch
from torch import Tensor

from mfd_fast.baselines.batch import Batch, ComparedObjective, column
from mfd_fast.distill.objectives import Metrics
from mfd_fast.flow.solvers import TIME_ULP, to_device
from mfd_fast.ops import interpolate

HUBER_CONSTANT = 0.00054


class ConsistencyDistillation(ComparedObjective):
    """Needs a teacher, data, and an average of the student (``ema_decay``) as the target."""

    sampler = "renoise"

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        nodes = num_nodes(self.config.step_size)
        n = torch.randint(nodes, (batch.size,), generator=batch.host).float()
        later, earlier = (n + 1) / nodes, n / nodes
        t = to_device(later, batch.device)
        x_t = interpolate(batch.data, batch.noise(), t)
        x_earlier = batch.fields.teacher_end(x_t, later, earlier, self.config)
        with batch.averaged():
            target = consistency(batch.fields.student, x_earlier, to_device(earlier, t.device))
        error = consistency(batch.fields.student, x_t, t) - target
        return self.distance(error), {"distance": error.detach().flatten(1).norm(dim=1).mean()}

    def distance(self, error: Tensor) -> Tensor:
        """d of ``[B, *S]`` errors, per element of a sample, ``[]``."""
        squares = error.flatten(1).square()
        if self.config.cd.distance == "l2":
            return squares.mean()
        c = HUBER_CONSTANT * math.sqrt(squares.shape[1])
        return ((squares.sum(1) + c * c).sqrt() - c).mean() / squares.shape[1]


def num_nodes(step_size: float) -> int:
    """Of the grid, such that each lies one solver step from the next."""
    return math.ceil((1.0 - TIME_ULP) / step_size)


def consistency(field, x: Tensor, t: Tensor) -> Tensor:
    """f(x, t) = x - t F(x, t)."""
    return x - column(t, x) * field(x, t)
