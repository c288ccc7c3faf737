"""What an evaluation of the published diffusers models does, with what is constant along a
trajectory computed once (``models/diffusers/constants``) and with all of it in every evaluation.

No weights: networks of the public configurations on ``meta``, in bf16, one row without adapters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bench.running import Options
from mfd_fast.cost.trace import Trace, Work
from mfd_fast.models import preset
from mfd_fast.models.diffusers.network import CONSTANTS, FamilyNetwork
from mfd_fast.models.diffusers.published import PUBLISHED
from mfd_fast.models.diffusers.shapes import outlined


@torch.no_grad()
def row(name: str) -> dict:
    """One model; nothing of one that has no constants."""
    family = outlined(preset(name))
    if not any(list(family.constants(network)) for network in family.networks.values()):
        return {}
    for transformer in family.networks.values():
        transformer.eval().to(torch.bfloat16)
        family.set_modes(transformer)
        family.without_values(transformer)
    network, cond = FamilyNetwork(family), family.blank(1)
    x, t = family.zeros(1, *family.sample_shape), torch.zeros(1, device="meta")
    with modulations(network) as found:
        whole, _ = traced(lambda: network(x, t, cond))
    once, made = traced(lambda: network.prepare(cond))
    rest, _ = traced(lambda: network(x, t, made))
    size = sum(leaf.nbytes for leaf in tree_leaves(made[CONSTANTS]))
    return {
        "preset": name,
        "tflop": round(whole.flops / 1e12, 4),
        "tflop_left": round(rest.flops / 1e12, 4),
        "tflop_once": round(once.flops / 1e12, 4),
        "operators": round(whole.num_ops),
        "operators_left": round(rest.num_ops),
        "operators_once": round(once.num_ops),
        "mb_a_row": round(size / 1e6, 1),
        "modulations": len(found),
        "modulation_gb": round(sum(x.weight.nbytes for x in found) / 1e9, 3),
        "network_gb": round(sum(p.nbytes for p in network.transformer.parameters()) / 1e9, 3),
    }


@contextmanager
def modulations(network: nn.Module) -> Iterator[list[nn.Linear]]:
    """The linear layers whose input has no tokens, in the calls inside: what follows from the time
    (and, in some families, from a pooled text).
    """
    found: list[nn.Linear] = []

    def look(layer: nn.Linear, args: tuple) -> None:
        if args[0].numel() == layer.in_features:
            found.append(layer)

    layers = [x for x in network.modules() if isinstance(x, nn.Linear)]
    hooks = [x.register_forward_pre_hook(look) for x in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def traced(call: Callable[[], Any]) -> tuple[Work, Any]:
    """What a call does, and gives."""
    with Trace() as trace:
        made = call()
    return trace.work[""], made


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    names = [name for name in PUBLISHED if options.wants(name)]
    rows = ([one] for name in names if (one := row(name)))
    return "constants", {"dtype": "bfloat16", "rows": 1}, rows
