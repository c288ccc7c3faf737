"""OccFM's transition network: the fast path against the reference, one evaluation of one sample.

python -m bench.bench_occfm [--smoke] [--out FILE.json]

Every row has the operators that the path dispatches and the bytes that they read and write, counted
on the same call; a fast evaluation finds what is constant along a trajectory prepared.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from bench.harness import Case, measure, verify
from bench.record import header, write
from bench.updates.networks import ReferenceOccfm
from bench.updates.networks import occfm_inputs as inputs
from mfd_fast.models.occfm import CONFIGS, OccfmConfig, OccfmNetwork
from mfd_fast.testing.counting import Count, Traffic

OP = "occfm_network"
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


def _inputs(network: OccfmNetwork, device: str) -> tuple:
    x, t, cond = inputs(1, network.config)
    x, t = x.to(device), t.to(device)
    cond = {name: value.to(device) for name, value in cond.items()}
    with torch.no_grad():
        prepared = network.prepare(cond)
        embedding = prepared["trajectory_embedding"]
        return x, t, cond, prepared | {"modulation": network.modulation(t, embedding)}


def case(name: str, config: OccfmConfig, device: str, is_train: bool) -> Case:
    network = OccfmNetwork(config).to(device).requires_grad_(is_train)
    paths = {"eager": reference, "ours": fast}
    if is_train:
        paths = {key: partial(train, path) for key, path in paths.items()}
    return Case(
        shape=name,
        dtype="float32",
        impls={key: partial(path, network) for key, path in paths.items()},
        inputs=partial(_inputs, network, device),
        bytes_moved=0,  # counted, and not the same for both
        exact=None if is_train else partial(reference, copy.deepcopy(network).double()),
    )


def cases(device: str, smoke: bool) -> Iterator[Case]:
    for name, config, is_train in SMOKE if smoke else SHAPES:
        yield case(name, config, device, is_train)


def rows_of(one: Case, device: str) -> list[dict]:
    """Time and count every path of a case, once it has proved right (``harness.verify``)."""
    verify(one)
    samples = {name: us for name, (us, _) in measure(one.impls, one.inputs, device).items()}
    rows = []
    for name, path in one.impls.items():
        args, tenths = one.inputs(), quantiles(samples[name], n=10)
        with Count() as count, Traffic() as traffic:
            path(*args)
        rows.append(
            {
                "shape": one.shape,
                "dtype": one.dtype,
                "impl": name,
                "ms": round(median(samples[name]) / 1e3, 2),
                "ms_p10": round(tenths[0] / 1e3, 2),
                "ms_p90": round(tenths[-1] / 1e3, 2),
                "speedup": round(median(samples["eager"]) / median(samples[name]), 3),
                "operators": count.total,
                "bytes_moved": traffic.bytes,
                "samples": len(samples[name]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_occfm", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--smoke", action="store_true", help="the tiny network only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    head, rows = header(OP, args.device, {"smoke": args.smoke}), []
    for one in cases(args.device, args.smoke):
        rows += rows_of(one, args.device)
        for row in rows[-len(one.impls) :]:
            print(
                f"{row['shape']:<20} {row['impl']:<6} {row['ms']:>9.1f} ms {row['speedup']:>6.2f}x "
                f"{row['operators']:>5} operators {row['bytes_moved'] / 1e9:>7.3f} GB",
                flush=True,
            )
        if args.out:
            write(args.out, head, rows)


if __name__ == "__main__":
    main()
