"""Inductive moment matching (Zhou, Ermon and Song 2025): match two one-step pushes to time s.

    f(x_t, t -> s) = x_t - (t - s) F(x_t, t, s)       the DDIM form for straight paths
    loss = w(t) MMD^2( f(x_t, t -> s), sg f(x_r, r -> s) ),   s <= r < t

x_r = (1 - r) x_0 + r eps is the DDIM interpolant of x_t and x_0; r lies a constant step of
eta = t / (1 - t) below t, but not below s.  M particles share (s, t) and are the two sets.  Laplace
kernel exp(-|a - b| / (D |t - s|)); w is ``time_weight``, with a = 1 and b = 5 in that paper's
letters.  Particles of a set keep their own conditions.

eta moves by 1/2^k of its range (``decrement_power``), the sets being M = 4.  The authors take
k = 15 for CIFAR-10 and k = 12 for ImageNet.  Here it is 12: a push learns from the one an eta step
earlier, so that knowledge of the data takes up to 2^k steps to reach t = 1, and 15 is for trainings
of hundreds of thousands of updates.
"""

import torch
from torch import Tensor

from mfd_fast.baselines.batch import Batch, ComparedObjective, column
from mfd_fast.distill.objectives import Metrics
from mfd_fast.flow.solvers import to_device
from mfd_fast.ops import interpolate

FIRST_TIME, LAST_TIME = 0.006, 0.994
KERNEL_FLOOR = 1e-8
LOG_SNR_SHIFT = 5.0  # b


class InductiveMomentMatching(ComparedObjective):
    """Needs data and a student with a second time; the teacher only lends its weights."""

    sampler = "map"
    second_time = True

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        particles = self.config.imm.particles
        if batch.size % particles:
            raise ValueError(
                f"imm compares sets of distill.imm.particles={particles} samples: the batch must "
                f"be a multiple of it, got {batch.size}"
            )
        t, r, s = (
            to_device(time.repeat_interleave(particles), batch.device)
            for time in self.draw_times(batch.size // particles, batch.host)
        )
        noise = batch.noise()
        x_t, x_r = (interpolate(batch.data, noise, time) for time in (t, r))
        with torch.no_grad():
            target = push(batch.fields.student, x_r, r, s)
        pushed = push(batch.fields.student, x_t, t, s)
        sets = (part.flatten(1).unflatten(0, (-1, particles)) for part in (pushed, target))
        t, s = t[::particles], s[::particles]
        discrepancy = squared_mmd(*sets, scale=t - s)
        return (time_weight(t) * discrepancy).mean(), {
            "distance": discrepancy.detach().clamp_min(0).sqrt().mean()
        }

    def draw_times(self, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """t > r >= s, each ``[groups]`` on the host; t and s uniform."""
        t = FIRST_TIME + (LAST_TIME - FIRST_TIME) * torch.rand(groups, generator=generator)
        s = FIRST_TIME + (t - FIRST_TIME) * torch.rand(groups, generator=generator)
        first, last = (end / (1 - end) for end in (FIRST_TIME, LAST_TIME))
        eta = t / (1 - t) - (last - first) / 2**self.config.imm.decrement_power
        r = torch.where(eta > 0, eta / (1 + eta), 0.0)
        return t, torch.maximum(r, s), s


def push(field, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """f(x, t -> s) of a student with a second time."""
    return x - column(t - s, x) * field(x, t, s)


def time_weight(t: Tensor) -> Tensor:
    """w = 1/2 sigmoid(b - l) (-dl/dt) (1 - t) / ((1 - t)^2 + t^2), l = log SNR(t); ``[B]``."""
    log_snr = 2 * (torch.log1p(-t) - torch.log(t))
    slope = 2 / (t * (1 - t))
    scale = (1 - t) / ((1 - t) ** 2 + t**2)
    return 0.5 * torch.sigmoid(LOG_SNR_SHIFT - log_snr) * slope * scale


def squared_mmd(a: Tensor, b: Tensor, *, scale: Tensor) -> Tensor:
    """Squared maximum mean discrepancy ``[G]`` of the sets a and b ``[G, M, D]``, V-statistic.

    Laplace kernel exp(-|x - y| / (D scale)), scale ``[G]``.  Zero when a equals b.
    """
    width = (a.shape[-1] * scale.clamp_min(KERNEL_FLOOR)).view(-1, 1, 1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = (x[:, :, None] - y[:, None]).square().sum(-1)
        return torch.exp(-squares.clamp_min(KERNEL_FLOOR**2).sqrt() / width)

    return (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).mean((1, 2))
