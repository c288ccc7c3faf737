"""OccFM's transition network: the fast path against the reference, one evaluation of one sample.

Every row has the operators that the path dispatches and the bytes that they read and write, counted
on the same call; a fast evaluation finds what is constant along a trajectory prepared.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from bench.harness import Implementations, measure, verify
from bench.running import Options, spread
from bench.updates.networks import ReferenceOccfm, occfm_inputs
from mfd_fast.models.occfm import CONFIGS, OccfmConfig, OccfmNetwork
from mfd_fast.testing.counting import Count, Traffic

PUBLISHED = CONFIGS["occfm"]
# (name, sizes, with the gradients to all parameters): training is measured on a smaller grid, for
# what the reference keeps for its backward does not fit everywhere.
SHAPES = [
    ("occfm 20x20", replace(PUBLISHED, grid=20), False),
    ("occfm 20x20 train", replace(PUBLISHED, grid=20), True),
    ("occfm 50x50", PUBLISHED, False),
]
SMOKE = [("tiny", CONFIGS["tiny"], False), ("tiny train", CONFIGS["tiny"], True)]


def fast(network: OccfmNetwork, x: Tensor, t: Tensor, cond: dict, prepared: dict) -> Tensor:
    return network(x, t, prepared)


def reference(network: OccfmNetwork, x: Tensor, t: Tensor, cond: dict, prepared: dict) -> Tensor:
    return ReferenceOccfm(network)(x, t, cond)


def train(velocity: Callable, network: OccfmNetwork, x: Tensor, t: Tensor, cond: dict, _: dict):
    """Nothing is prepared: the trajectory embedding and the history's convolution are trained."""
    v = velocity(network, x, t, cond, cond)
    return torch.autograd.grad(v.square().mean(), list(network.parameters()))


def inputs(network: OccfmNetwork, device: str) -> tuple:
    x, t, cond = occfm_inputs(1, network.config)
    x, t = x.to(device), t.to(device)
    cond = {name: value.to(device) for name, value in cond.items()}
    with torch.no_grad():
        prepared = network.prepare(cond)
        embedding = prepared["trajectory_embedding"]
        return x, t, cond, prepared | {"modulation": network.modulation(t, embedding)}


def counted(
    impls: Implementations, make: Callable[[], tuple], options: Options, **case: object
) -> list[dict]:
    """Milliseconds, operators and bytes of every implementation of a case."""
    taken = measure(impls, make, options.device, options.share)
    rows, samples = [], {name: us for name, (us, _) in taken.items()}
    for name, run in impls.items():
        args = make()
        with Count() as count, Traffic() as traffic:
            run(*args)
        rows.append(
            {
                **case,
                "impl": name,
                **spread(samples[name], "ms", 1e-3, 2),
                "speedup": round(median(samples["eager"]) / median(samples[name]), 3),
                "operators": count.total,
                "bytes_moved": traffic.bytes,
                "samples": len(samples[name]),
            }
        )
    return rows


def rows_of(name: str, config: OccfmConfig, options: Options, is_train: bool) -> list[dict]:
    """Both paths of a case, once they have proved right."""
    network = OccfmNetwork(config).to(options.device).requires_grad_(is_train)
    paths: Implementations = {"eager": reference, "ours": fast}
    if is_train:
        paths = {key: partial(train, path) for key, path in paths.items()}
    impls = {key: partial(path, network) for key, path in paths.items()}
    make = partial(inputs, network, options.device)
    exact = None if is_train else partial(reference, copy.deepcopy(network).double())
    verify(impls, make, exact, name)
    return counted(impls, make, options, shape=name, dtype="float32")


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    shapes = [one for one in (SMOKE if options.smoke else SHAPES) if options.wants(one[0])]
    batches = (rows_of(name, config, options, is_train) for name, config, is_train in shapes)
    return "occfm_network", {"smoke": options.smoke}, batches
