"""Every pinned vector of OccFM's networks and VAEs at full size; minutes on a CPU.

python -m pytest tests/models/occfm/full_vectors.py [-k occfm_fut]

The test suite checks one network, and all of the VAEs but the 3-D one's encoder and second half
and the encoder's weak vector.  A network is held to the noise floor published with the vectors.
"""

import pytest
import torch
import torch.nn.functional as F
from occfm_fill import NOISE_FLOOR, VECTORS, assert_pinned, fill, noise, uniform
from test_occfm_vae import check_decoder, check_encoder, pinned_ids, pinned_latents

from bench.updates import occfm_reference as reference
from mfd_fast.models.occfm import CONFIGS, OccfmNetwork, forecast
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d

NETWORKS = ("occfm", "occfm_fut")
FRAMES = (6, 16, 50, 50)
TAU = torch.tensor([125.0, 730.0])


def trajectories():
    return torch.from_numpy(4 * uniform(48, 1001)).float().reshape(2, 12, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sine", "hash"])
@pytest.mark.parametrize("name", NETWORKS)
def test_velocity_and_every_probe(name, kind):
    """Of the reference; the fast path beside it."""
    network, expected = fill(OccfmNetwork(CONFIGS[name]), kind), VECTORS[name][kind]
    sequence = noise((2, 12, 16, 50, 50), 1000)
    for stage, result in reference.stages(network, sequence, TAU, trajectories()):
        assert_pinned(result, expected["probes"][stage], stage)
    velocity = result.transpose(1, 2)
    assert_pinned(velocity, expected["velocity"], "velocity")
    cond = {"history": sequence[:, :6] / 10, "trajectory": trajectories()}
    fast = network(sequence[:, 6:], 1 - TAU / 1000, cond)
    assert (fast + velocity[:, 6:]).abs().max() <= NOISE_FLOOR


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_training_loss(name):
    """Flow matching on the future frames, in the engine's direction."""
    network = fill(OccfmNetwork(CONFIGS[name]))
    history, future, eps = (noise((2, *FRAMES), stream) for stream in (1002, 1003, 1004))
    t = 1 - torch.tensor([0.3, 0.8])
    time = t.view(-1, 1, 1, 1, 1)
    cond = {"history": history / 10, "trajectory": trajectories()}
    v = network((1 - time) * future + time * eps, t, cond)
    assert abs(F.mse_loss(v, eps - future).item() - VECTORS[name]["train_loss"]) <= NOISE_FLOOR


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_sampler(name):
    """Ten guided steps of the fast path."""
    network = fill(OccfmNetwork(CONFIGS[name]))
    history, trajectory = noise((1, *FRAMES), 1005), trajectories()[:1]
    history[:, :2], trajectory[:, :2] = 0, 0
    cond = {"history": history / 10, "trajectory": trajectory}
    expected = VECTORS[name]["sampler"]["output"]
    assert_pinned(forecast(network, noise((1, *FRAMES), 1006), cond), expected, "sampler")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "cls"),
    [("occfm_vae", "sine", OccupancyVae), ("occfm_vae", "hash", OccupancyVae),
     ("occfm_3dvae", "hash", OccupancyVae3d)],
)  # fmt: skip
def test_vae(name, kind, cls):
    vae, expected = fill(cls(VAE_CONFIGS[name]), kind).eval(), VECTORS[name][kind]
    frames = vae.config.clip or 1
    check_decoder(vae, pinned_latents(frames), expected)
    check_encoder(vae, pinned_ids(frames), expected)
