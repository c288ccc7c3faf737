"""Times: the distributions of t and of pairs (t, r), and the schedules of few-step samplers.

t = 1 is noise, t = 0 is data, float32 ``[B]``.  Times are drawn on the device of ``generator`` (the
CPU in the distiller: the number of solver steps must be known on the host) and never in bf16.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

DISTRIBUTIONS = ("logit_normal", "uniform")
MAX_REDRAWS = 10_000


class Schedule(NamedTuple):
    """A fixed trajectory of K solver steps.

    ``nodes`` are the K + 1 times that the state visits, descending; ``times`` the K times shown to
    the network (they differ from ``nodes[:-1]`` when a checkpoint's scheduler rounds its
    timesteps).  The state at ``nodes[0]`` is ``start`` times standard normal noise: 1, or
    ``nodes[0]`` of a flow that begins below t = 1, where x_t = (1 - t) data + t noise.
    """

    nodes: tuple[float, ...]
    times: tuple[float, ...]
    start: float = 1.0

    def begin(self, noise: Tensor) -> Tensor:
        """The state at ``nodes[0]`` from standard normal noise, both ``[B, ...]``."""
        return noise if self.start == 1.0 else self.start * noise


def uniform_schedule(steps: int) -> Schedule:
    """K equal steps from 1 to 0."""
    return shifted_schedule(steps, shift=1.0)


def shifted_schedule(steps: int, *, shift: float) -> Schedule:
    """K steps from 1 to 0, uniform in u, at t = s u / (1 + (s - 1) u): s > 1 spends more near
    noise.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"a schedule needs steps >= 1 and shift > 0; got {steps} and {shift}")
    uniform = [1.0 - k / steps for k in range(steps + 1)]
    nodes = tuple(shift * u / (1.0 + (shift - 1.0) * u) for u in uniform)
    return Schedule(nodes, nodes[:-1])


def dpm_flow_schedule(steps: int, *, shift: float = 3.0, train_steps: int = 1000) -> Schedule:
    """The schedule of diffusers' DPM-Solver++ with flow sigmas, which SANA checkpoints name.

    sigma is shifted from a uniform grid that starts at 1 - 1/train_steps; the network sees
    floor(sigma * train_steps) / train_steps.  K = 4, shift 3: sigmas .9997 .8996 .7496 .4997 0 and
    timesteps 999 899 749 499.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"a schedule needs steps >= 1 and shift > 0; got {steps} and {shift}")
    first = 1.0 - 1.0 / train_steps
    raw = [first * (1.0 - k / steps) for k in range(steps)]
    sigmas = tuple(shift * s / (1.0 + (shift - 1.0) * s) for s in raw)
    times = tuple(math.floor(s * train_steps) / train_steps for s in sigmas)
    return Schedule((*sigmas, 0.0), times)


def on_grid(t: Tensor, grid: int | None) -> Tensor:
    """t rounded to multiples of 1/grid, in its own dtype; t itself without a grid (0, None)."""
    return (torch.round(t.double() * grid) / grid).to(t.dtype) if grid else t


def sample_times(
    batch: int,
    distribution: str = "logit_normal",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Draw ``[batch]`` float32 times in [0, 1].

    Args:
        distribution: ``"logit_normal"``: sigmoid(n), n ~ N(mean, std^2); or ``"uniform"``.
        mean, std: of n; not used by ``"uniform"``.
        generator: decides the device; the CPU's default generator if None.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {list(DISTRIBUTIONS)}, got {distribution!r}")
    if batch < 1 or std < 0:
        raise ValueError(f"sample_times: batch >= 1 and std >= 0 expected; got {batch} and {std}")
    device = generator.device if generator is not None else "cpu"
    if distribution == "uniform":
        return torch.rand(batch, generator=generator, device=device)
    return torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=device))


def sample_time_pairs(
    batch: int,
    distribution: str = "logit_normal",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    equal_fraction: float = 0.0,
    min_interval: float = 0.0,
    max_interval: float | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw pairs t >= r, each ``[batch]`` float32: two independent times, the larger one first.

    Args:
        equal_fraction: probability that a sample takes r = t (1 gives the VSD limit).
        min_interval: redraw the other samples until t - r >= min_interval.
        max_interval: raise r to t - max_interval where the pair is wider; None: no limit.
    """
    if not 0.0 <= equal_fraction <= 1.0:
        raise ValueError(f"equal_fraction must be in [0, 1], got {equal_fraction}")
    if not 0.0 <= min_interval < 1.0:
        raise ValueError(f"min_interval must be in [0, 1), got {min_interval}")
    if max_interval is not None and not max(min_interval, 0.0) < max_interval:
        raise ValueError(
            f"max_interval must be above min_interval {min_interval}, got {max_interval}"
        )

    def draw():
        a, b = (
            sample_times(batch, distribution, mean=mean, std=std, generator=generator) for _ in "tr"
        )
        return torch.maximum(a, b), torch.minimum(a, b)

    t, r = draw()
    for _ in range(MAX_REDRAWS):
        short = t - r < min_interval
        if not short.any():
            break
        t_new, r_new = draw()
        t, r = torch.where(short, t_new, t), torch.where(short, r_new, r)
    else:
        raise ValueError(
            f"min_interval={min_interval} was not reached in {MAX_REDRAWS} redraws of "
            f"{distribution} (mean {mean}, std {std}); lower min_interval or widen the distribution"
        )
    if max_interval is not None:
        r = torch.maximum(r, t - max_interval)
    if equal_fraction > 0.0:
        device = generator.device if generator is not None else "cpu"
        is_equal = torch.rand(batch, generator=generator, device=device) < equal_fraction
        r = torch.where(is_equal, t, r)
    return t, r
