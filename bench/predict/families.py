"""What ``mfd-fast estimate`` predicts for the published diffusers models, on three cards.

No weights: networks of the public configurations on ``meta``.  A card's numbers are of the fastest
profile that fits; text encoders and updates are not on it at the same time.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.running import Options
from mfd_fast.cost import device_named
from mfd_fast.cost.devices import assumed
from mfd_fast.cost.plans import CONTEXT_BYTES, best_of, cycle_of, profiles_of
from mfd_fast.cost.trace import Trace
from mfd_fast.models import preset
from mfd_fast.models.diffusers.network import FamilyNetwork
from mfd_fast.models.diffusers.published import PUBLISHED
from mfd_fast.models.diffusers.shapes import beside_the_updates, outlined
from mfd_fast.run.maker import run_is_captured

GPUS = ("rtx4090", "h100", "h200")
CYCLES = 1000
POLICIES = ("none", "block")  # what every family allows


def row(name: str) -> dict:
    """One model on every card."""
    config = preset(name).resolved()
    beside = beside_the_updates(config)
    trains = {policy: replace(config.train, activation=policy) for policy in POLICIES}
    cycles = {policy: cycle_of(replace(config, train=x), 1) for policy, x in trains.items()}
    is_captured = run_is_captured(config, "cuda")
    parameters, flops = size_of(name)
    made = {
        "preset": name,
        "parameters_b": round(parameters / 1e9, 3),
        "tflop": round(flops / 1e12, 2),
        "encoders_gb": round(beside["text encoders"] / 1e9, 2),
        "vae_gb": round(beside["VAE"] / 1e9, 2),
        "tflop_a_cycle": round(cycles["none"].total.flops / 1e12, 1),
        "is_captured": is_captured,
    }
    for gpu in GPUS:
        device = device_named(gpu)
        efficiency = assumed(is_captured=is_captured)
        profiles = profiles_of(cycles, device, efficiency, is_captured=is_captured)
        best = best_of(profiles, device)
        made[gpu] = {
            "fits": best.bytes <= device.memory,
            "text_fits": beside["text encoders"] + CONTEXT_BYTES <= device.memory,
            "gb": round(best.bytes / 1e9, 1),
            "hours": [round(CYCLES * end / 3600, 2) for end in best.seconds],
            "activation": best.activation,
            "optimizer": best.optimizer,
        }
    return made


def size_of(name: str) -> tuple[float, float]:
    """Parameters, and operations of one evaluation of one row."""
    family = outlined(preset(name))
    transformer = family.pipe.transformer.eval()
    family.set_modes(transformer)
    family.without_values(transformer)
    x = torch.empty(1, *family.sample_shape, device="meta")
    with torch.no_grad(), Trace() as trace:
        FamilyNetwork(family)(x, torch.empty(1, device="meta"), family.blank(1))
    return sum(p.numel() for p in transformer.parameters()), trace.work[""].flops


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    config = {
        "cycles": CYCLES,
        "gpus": {gpu: device_named(gpu).source for gpu in GPUS},
        "shares": assumed(is_captured=True).shares,
        "efficiency": assumed(is_captured=True).source,
    }
    names = [name for name in PUBLISHED if options.wants(name)]
    return "families", config, ([row(name)] for name in names)
