"""Small OccFM transition networks, their inputs, and the sampler in the checkpoint's convention."""

import copy
from itertools import pairwise

import occfm_reference as reference
import torch
from occfm_fill import fill

from mfd_fast.models.occfm import CONFIGS, OccfmNetwork

TINY = CONFIGS["tiny"]
LATENT_STD = 0.1  # of what the VAE makes; the network sees ten times as much


def make_network(config=TINY, dtype=torch.float32):
    """Hash-filled, so that no part of the network is idle."""
    return fill(OccfmNetwork(config)).to(dtype)


def wide(network):
    """A float64 copy, parameters bit for bit."""
    return copy.deepcopy(network).double()


def inputs(rows, config=TINY, seed=0):
    """x, t and cond of a call, float32; the first row has no history."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *config.sample_shape, generator=generator)
    history = torch.randn(rows, config.history, *config.latent_shape, generator=generator)
    history[0] = 0
    trajectory = 4 * torch.randn(rows, config.frames, 2, generator=generator)
    t = torch.rand(rows, generator=generator)
    return x, t, {"history": LATENT_STD * history, "trajectory": trajectory}


def reference_velocity(network, x, t, cond):
    """``noise - data`` of the future frames by the reference, in the dtype of the network."""
    config, dtype = network.config, network.dtype
    history = (cond["history"] * config.latent_scale).to(dtype)
    sequence = torch.cat([history, x.to(dtype)], dim=1)
    tau = 1000 * (1 - t)
    return -reference.velocity(network, sequence, tau, cond["trajectory"])[:, config.history :]


def reference_forecast(network, noise, cond, *, steps=10, guidance=2.0, shift=3.0):
    """The sampler in its own time, 0 = noise: a doubled batch a step, unconditional half first."""
    config = network.config
    history = config.latent_scale * cond["history"]
    both = torch.cat([torch.zeros_like(history), history])
    trajectory = torch.cat([cond["trajectory"]] * 2)
    uniform = torch.arange(steps + 1, dtype=torch.float64) / steps
    times = (uniform / (shift - (shift - 1) * uniform)).tolist()
    x = noise.to(network.dtype)
    for now, after in pairwise(times):
        sequence = torch.cat([both.to(x.dtype), torch.cat([x, x])], dim=1)
        tau = 1000 * (1 - torch.full((len(sequence),), 1 - now))  # the engine's times are float32
        v = reference.velocity(network, sequence, tau, trajectory)[:, config.history :]
        without, given = v.chunk(2)
        x = x + (after - now) * (without + guidance * (given - without))
    return x / config.latent_scale
