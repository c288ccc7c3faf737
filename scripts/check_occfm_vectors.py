"""Every pinned vector of OccFM's transition networks at full size; minutes on a CPU.

python scripts/check_occfm_vectors.py [occfm] [occfm_fut]

The test suite checks one of them (``test_occfm_network.py``).  Each line is a vector that was met
within the noise floor that was published with it; the first that is not ends the run.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import occfm_reference as reference
from occfm_fill import NOISE_FLOOR, VECTORS, assert_pinned, fill, noise, uniform

from mfd_fast.models.occfm import CONFIGS, OccfmNetwork, forecast

NAMES = ("occfm", "occfm_fut")
FRAMES = (6, 16, 50, 50)
TAU = torch.tensor([125.0, 730.0])


def trajectories() -> torch.Tensor:
    return torch.from_numpy(4 * uniform(48, 1001)).float().reshape(2, 12, 2)


def check_velocity(network: OccfmNetwork, expected: dict) -> Iterator[str]:
    """Every probe and the velocity of the reference; the fast path beside it."""
    sequence, count = noise((2, 12, 16, 50, 50), 1000), 0
    for name, result in reference.stages(network, sequence, TAU, trajectories()):
        assert_pinned(result, expected["probes"][name], name)
        count += 1
    assert_pinned(result.transpose(1, 2), expected["velocity"], "velocity")
    yield f"velocity and {count} probes of {len(expected['probes'])}"
    cond = {"history": sequence[:, :6] / 10, "trajectory": trajectories()}
    fast = network(sequence[:, 6:], 1 - TAU / 1000, cond)
    error = (fast + result.transpose(1, 2)[:, 6:]).abs().max().item()
    assert error <= NOISE_FLOOR, f"the fast path is off by {error:.2e}"
    yield f"fast path, largest difference {error:.1e}"


def check_loss(network: OccfmNetwork, expected: float) -> Iterator[str]:
    """Flow matching on the future frames, in the engine's direction."""
    history, future, eps = (noise((2, *FRAMES), stream) for stream in (1002, 1003, 1004))
    t = 1 - torch.tensor([0.3, 0.8])
    time = t.view(-1, 1, 1, 1, 1)
    cond = {"history": history / 10, "trajectory": trajectories()}
    v = network((1 - time) * future + time * eps, t, cond)
    error = abs(F.mse_loss(v, eps - future).item() - expected)
    assert error <= NOISE_FLOOR, f"the training loss is off by {error:.2e}"
    yield f"training loss, difference {error:.1e}"


def check_sampler(network: OccfmNetwork, expected: dict) -> Iterator[str]:
    """Ten guided steps of the fast path."""
    history, trajectory = noise((1, *FRAMES), 1005), trajectories()[:1]
    history[:, :2], trajectory[:, :2] = 0, 0
    cond = {"history": history / 10, "trajectory": trajectory}
    assert_pinned(forecast(network, noise((1, *FRAMES), 1006), cond), expected["output"], "sampler")
    yield "sampler"


@torch.no_grad()
def main() -> None:
    for name in sys.argv[1:] or NAMES:
        expected = VECTORS[name]
        for kind in ("sine", "hash"):
            network = fill(OccfmNetwork(CONFIGS[name]), kind)
            for line in check_velocity(network, expected[kind]):
                print(f"{name} {kind}: {line}", flush=True)
        for line in check_loss(network, expected["train_loss"]):
            print(f"{name}: {line}", flush=True)
        for line in check_sampler(network, expected["sampler"]):
            print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main()
