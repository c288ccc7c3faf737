"""SANA networks with a LoRA for the tests of its files, and PEFT's deltas of them."""

import diffusers
import torch

from mfd_fast.models.sana.lora_files import Lora
from mfd_fast.models.sana.tiny import TRANSFORMER
from mfd_fast.testing.numerics import assert_as_accurate

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "proj_out"]
LAYERS = [*LINEAR, "conv_inverted", "conv_point"]
QKV = ["to_q", "to_k", "to_v"]


def network():
    return diffusers.SanaTransformer2DModel(**TRANSFORMER)


def assert_strength_one(lora, deltas):
    assert lora.factors.keys() == deltas.keys()
    for name, (delta, exact) in deltas.items():
        a, b = lora.factors[name]
        assert_as_accurate(b.flatten(1) @ a.flatten(1), delta, exact)


def random_lora(targets, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in network().named_modules():
        if any(name == end or name.endswith(f".{end}") for end in targets):
            rows, columns, *rest = module.weight.shape
            a = torch.randn(rank, columns, *rest, generator=generator)
            factors[name] = (a, torch.randn(rows, rank, *rest, generator=generator))
    return Lora(factors)


def deltas_of(lora):
    return {
        name: (b.flatten(1) @ a.flatten(1), b.double().flatten(1) @ a.double().flatten(1))
        for name, (a, b) in lora.factors.items()
    }
