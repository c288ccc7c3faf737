"""Pinned OccFM vectors: weights and inputs from an integer hash, and their expected outputs.

The hash is that of a published set of test vectors: every value follows from its flat index and a
stream number alone, so the same network can be filled anywhere without a file of weights.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

VECTORS = json.loads((Path(__file__).parents[1] / "data/occfm_vectors.json").read_text())
# fp32 noise floor of the vectors: the same model on two convolution back ends differs by 1e-5.
NOISE_FLOOR = 5e-5
MASK = np.uint64(0xFFFFFFFF)


def hash_integers(count, stream):
    """H(0..count-1, stream): uint64 values below 2^32."""
    x = np.arange(count, dtype=np.uint64) * np.uint64(2654435761)
    x = (x + np.uint64(stream * 40503 + 1)) & MASK
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(2246822519)) & MASK
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(3266489917)) & MASK
    return x ^ (x >> np.uint64(16))


def uniform(count, stream):
    """U(0..count-1, stream) in [-1, 1), float64."""
    return hash_integers(count, stream) / 2.0**31 - 1.0


def noise(shape, stream):
    """Float32 of unit variance."""
    values = math.sqrt(3) * uniform(math.prod(shape), stream)
    return torch.from_numpy(values).float().reshape(shape)


def trainable(module):
    """Trainable parameters by name, in the plain string order that numbers their streams."""
    return sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _hash_values(name, parameter, stream):
    *parents, leaf = name.split(".")
    u = uniform(parameter.numel(), stream)
    is_norm_gain = leaf == "weight" and parameter.ndim == 1 and "norm" in (parents or [""])[-1]
    if leaf == "gamma" or is_norm_gain:
        return 1 + 0.2 * u
    if leaf == "logit_scale":
        return math.log(10) + 0.2 * u
    if leaf == "absolute_pos_embed" or parameter.ndim == 1:
        return 0.1 * u
    return u * math.sqrt(3 / (parameter.numel() / parameter.shape[0]))


def _sine_values(_, parameter, stream):
    return 0.02 * np.sin(0.37 * np.arange(parameter.numel()) + stream)


@torch.no_grad()
def fill(module, kind="hash"):
    """Set every trainable parameter of ``module``: kind "hash" or "sine"; returns the module."""
    values = {"hash": _hash_values, "sine": _sine_values}[kind]
    for stream, (name, parameter) in enumerate(trainable(module)):
        new = torch.from_numpy(np.asarray(values(name, parameter, stream)))
        parameter.copy_(new.reshape(parameter.shape))
    return module


def _assert_close(actual, expected, name):
    error = (actual - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    assert error <= NOISE_FLOOR, f"{name} is off by {error:.2e}"


def assert_samples(actual, expected, name):
    """Every ``stride``-th element of ``actual`` is the pinned one."""
    flat = actual.detach().double().flatten()[:: expected["stride"]]
    _assert_close(flat[: len(expected["values"])], expected["values"], f"{name}: strided")


def assert_pinned(actual, expected, name):
    """``actual`` has the shape, moments and samples of ``expected``, a record of the vectors."""
    assert list(actual.shape) == expected["shape"], name
    flat = actual.detach().double().flatten()
    _assert_close(flat.mean(), expected["mean"], f"{name}: mean")
    _assert_close(flat.std(correction=0), expected["std_population"], f"{name}: std")
    _assert_close(flat.abs().max(), expected["absmax"], f"{name}: absmax")
    _assert_close(flat[:8], expected["first8"], f"{name}: first8")
    if "strided" in expected:
        assert_samples(actual, expected["strided"], name)
