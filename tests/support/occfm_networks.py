"""Small OccFM transition networks, their inputs, and the sampler in the checkpoint's convention."""

import copy
from itertools import pairwise

import torch
from occfm_fill import fill

from bench.updates import occfm_reference as reference
from bench.updates.networks import ReferenceOccfm, occfm_inputs
from mfd_fast.models.occfm import CONFIGS, OccfmNetwork

TINY = CONFIGS["tiny"]


def make_network(config=TINY, dtype=torch.float32):
    """Hash-filled, so that no part of the network is idle."""
    return fill(OccfmNetwork(config)).to(dtype)


def wide(network):
    """A float64 copy, parameters bit for bit."""
    return copy.deepcopy(network).double()


def inputs(rows, config=TINY, seed=0):
    """x, t and cond of a call, float32; the first row has no history."""
    return occfm_inputs(rows, config, seed)


def reference_velocity(network, x, t, cond):
    """``noise - data`` of the future frames by the reference, in the dtype of the network."""
    return ReferenceOccfm(network)(x, t, cond)


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
