"""DMD2 (Yin et al., "Improved Distribution Matching Distillation", 2024), for flows.

    x0_T = x_t - t v_T,   x0_A = x_t - t v_A          what both make of the noised sample
    dL/dx_0 = (x0_A - x0_T) / mean |x_0 - x0_T|       the mean over each sample
    + gan_weight softplus(-D(x_t))                    non-saturating adversarial loss

D is a small head on the middle features of the auxiliary, trained with it: softplus(D(fake)) +
softplus(-D(real)).  A student of K steps is trained on its own noisy states (backward simulation).
As in the public code all times but the auxiliary's own are uniform in [.02, .98], and D's samples
are noised to other ones than the flow matching's.
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.baselines.batch import Batch, ComparedObjective, column
from mfd_fast.baselines.sampling import renoised_states
from mfd_fast.distill.objectives import Metrics
from mfd_fast.flow.solvers import to_device
from mfd_fast.ops import interpolate, interpolate_with_target

SMALLEST_NORMALISER = 1e-6
FIRST_TIME, LAST_TIME = 0.02, 0.98


class DistributionMatching(ComparedObjective):
    """Needs teacher, auxiliary and data; networks must name their ``middle`` and its width."""

    roles = ("aux", "student")
    sampler = "renoise"
    head: "Head"

    def bind(self, backbone, features) -> None:
        if features is not None:
            raise ValueError("dmd2 reads the auxiliary's own features; drop features=")
        if self.config.aux_draws_per_sample != 1:
            raise ValueError("distill.aux_draws_per_sample must be 1 for dmd2 and senseflow")
        self.head = self.make_head(backbone, middle_width(backbone.aux))

    def make_head(self, backbone, width: int) -> "Head":
        """The discriminator's trained part, the same for every run of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return Head(width).to(backbone.device)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return list(self.head.parameters()) if role == "aux" else []

    def aux_loss(self, batch: Batch, t: Tensor) -> Tensor:
        with torch.no_grad():
            x0 = self.segment(batch).x0
        fake, target = interpolate_with_target(x0, batch.noise(), t)
        loss = F.mse_loss(batch.fields.aux(fake, t), target)
        if self.config.dmd2.critic_weight == 0:
            return loss
        fake_logit, real_logit = (
            self.logit(batch, x, self.draw_times(batch)) for x in (x0, batch.data)
        )
        critic = F.softplus(fake_logit).mean() + F.softplus(-real_logit).mean()
        return loss + self.config.dmd2.critic_weight * critic

    def draw_times(self, batch: Batch) -> Tensor:
        """t ``[B]`` of the matching and of the discriminator."""
        share = torch.rand(batch.size, generator=batch.host)
        return to_device(FIRST_TIME + (LAST_TIME - FIRST_TIME) * share, batch.device)

    def logit(self, batch: Batch, x0: Tensor, t: Tensor) -> Tensor:
        """D of samples ``[B, *S]``, noised to t; ``[B]``."""
        x_t = interpolate(x0, batch.noise(), t)
        return self.head(
            with_middle(batch.fields.backbone.aux, lambda: batch.fields.aux(x_t, t))[1]
        )

    def student_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return self.matching_loss(batch, self.segment(batch).x0)

    def matching_loss(self, batch: Batch, x0: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of the student's samples x0 ``[B, *S]``, differentiable in them."""
        t = self.draw_times(batch)
        with torch.no_grad():
            x_t = interpolate(x0, batch.noise(), t)
            v_teacher, v_aux = batch.fields.teacher(x_t, t), batch.fields.aux(x_t, t)
            gradient = normalised_gradient(x0, x_t, t, v_teacher, v_aux)
        loss = (gradient * x0).mean()
        if self.config.dmd2.gan_weight > 0:
            fooling = self.fooling_loss(batch, x0, self.draw_times(batch))
            loss = loss + self.config.dmd2.gan_weight * fooling
        distance = (v_teacher - v_aux).flatten(1).norm(dim=1).mean()
        return loss, {"distance": distance}

    def fooling_loss(self, batch: Batch, x0: Tensor, t: Tensor) -> Tensor:
        """softplus(-D), with a gradient to x0 alone: the discriminator must not learn from it."""
        leaf = x0.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.softplus(-self.logit(batch, leaf, t)).mean(), leaf)
        return (gradient * x0).sum()

    def segment(self, batch: Batch) -> "Segment":
        """A step of the student's sampler, with gradient.

        Which of the K steps is drawn on the host; the steps before it have no gradient.
        """
        nodes = self.schedule.nodes
        k = int(torch.randint(len(nodes) - 1, (), generator=batch.host))
        with torch.no_grad():
            x = self.state(batch, k)
        t = torch.full((batch.size,), nodes[k], device=batch.device)
        return Segment(x, nodes[k], nodes[k + 1], batch.fields.student(x, t))

    def state(self, batch: Batch, k: int) -> Tensor:
        """The student's own state ``[B, *S]`` at node k (backward simulation)."""
        states = renoised_states(batch.fields.student, batch.noise(), self.schedule, batch.noise)
        return next(islice(states, k, None))[0]


class Segment(NamedTuple):
    """One step of the student: state x ``[B, *S]`` at t, the next node r, velocity F(x, t)."""

    x: Tensor
    t: float
    r: float
    velocity: Tensor

    @property
    def x0(self) -> Tensor:
        """The sample that the student predicts from here."""
        return self.x - self.t * self.velocity

    @property
    def x_r(self) -> Tensor:
        """Where its Euler step ends."""
        return self.x - (self.t - self.r) * self.velocity


def normalised_gradient(
    x0: Tensor, x_t: Tensor, t: Tensor, v_teacher: Tensor, v_aux: Tensor
) -> Tensor:
    """(x0_A - x0_T) / mean |x_0 - x0_T| ``[B, *S]``."""
    time = column(t, x_t)
    x0_teacher, x0_aux = x_t - time * v_teacher, x_t - time * v_aux
    norm = (x0 - x0_teacher).abs().flatten(1).mean(1).clamp_min(SMALLEST_NORMALISER)
    return (x0_aux - x0_teacher) / column(norm, x_t)


class Head(nn.Module):
    """Features ``[B, D]`` to a logit ``[B]``: above 0 for real."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(self.layers[1].weight.dtype))[:, 0]


def middle_width(network: nn.Module) -> int:
    """Features of the network's ``middle`` layer; ``ValueError`` for a network without one."""
    if not hasattr(network, "middle"):
        raise ValueError(
            f"the discriminator reads the middle of the network: {type(network).__name__} must "
            "have a module `middle` and an int `middle_width`"
        )
    return network.middle_width


def with_middle(network: nn.Module, evaluate: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What ``evaluate`` returns, and the output of ``network.middle`` in it, averaged over space.

    Tokens ``[B, T, D]`` or images ``[B, D, H, W]`` become ``[B, D]``.
    """
    kept: list[Tensor] = []
    handle = network.middle.register_forward_hook(lambda _module, _input, out: kept.append(out))
    try:
        value = evaluate()
    finally:
        handle.remove()
    features = kept[0]
    return value, features.mean(1) if features.ndim == 3 else features.flatten(2).mean(2)
