"""Small networks of diffusers on a frozen base, and the gradients of one update of each role."""

import copy

import diffusers
import torch
from small_networks import draw_adapter
from tiny_pipelines import SIDES, tiny_pipeline

from mfd_fast import DistillConfig, Distiller
from mfd_fast.backbones.quantized import FrozenLinear, quantize_network
from mfd_fast.backbones.swap import plan_swap
from mfd_fast.models.diffusers.backbone import backbone_of
from mfd_fast.models.diffusers.family import Family, family_of, named

TOKENS = 16
PROMPTS = ["a red fox", "a much longer prompt: a cat on the snow"]


def as_plain(network):
    """The network with dequantised weights in ordinary layers."""
    plain = copy.deepcopy(network)
    for name, layer in [*plain.named_modules()]:
        if isinstance(layer, FrozenLinear):
            made = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            made.weight, made.bias = torch.nn.Parameter(layer.weight.clone()), layer.bias
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, made)
    return plain.requires_grad_(False)


def family_with(name, network, tokens=None):
    """The family around a network, and conditions in its dtype of so many tokens, None: all."""
    pipe = tiny_pipeline(name)
    side = SIDES.get(name, 64)
    family = family_of(pipe, height=side, width=side)
    cond = family.encode(PROMPTS)
    null = family.encode_null() if family.has_null else None
    pipe.register_modules(transformer=network)
    dtype = network.dtype
    for row in (cond, null or {}):
        for key, x in row.items():
            row[key] = x.to(dtype) if x.is_floating_point() else x
            row[key] = row[key][:, :tokens] if key == "text" else row[key]
    family.null_row = null
    return family, cond


def updates(name, network, *, place=lambda backbone: None, **options):
    """Gradients of an auxiliary and a student update, and what was used to take them.

    place: what is done to the backbone before.
    """
    family, cond = family_with(name, network, TOKENS)
    backbone = backbone_of(family, rank=4, **options)
    for seed, adapter in enumerate(("aux", "student")):
        draw_adapter(backbone.adapters, adapter, seed)
    place(backbone)
    config = DistillConfig(student_steps=2, guidance=family.guidance, step_size=0.3, aux_updates=1)
    distiller = Distiller(backbone, config)
    grads = {}
    for role, update in (("aux", distiller.aux_step), ("student", distiller.student_step)):
        (parameter,) = distiller.parameters_of(role)
        hook = parameter.register_post_accumulate_grad_hook(
            lambda p, role=role: grads.update({role: p.grad.clone()})
        )
        update(cond)
        hook.remove()
    return grads, backbone


def quantised(name, base, dtype=torch.bfloat16):
    network = tiny_pipeline(name).transformer.to(dtype).requires_grad_(False)
    quantize_network(named(network), Family.blocks, base)
    return network


def flux(base, dtype=torch.float32, blocks=4):
    """A FLUX of twice as many blocks."""
    tiny = tiny_pipeline("flux1-dev").transformer
    torch.manual_seed(1)
    network = diffusers.FluxTransformer2DModel.from_config(
        tiny.config, num_layers=blocks, num_single_layers=blocks
    )
    network = network.eval().to(dtype).requires_grad_(False)
    quantize_network(named(network), Family.blocks, base)
    return network


def sizes(network):
    blocks = {}
    for stack in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(network, stack)):
            layers = (x for x in block.modules() if isinstance(x, FrozenLinear))
            blocks[f"transformer.{stack}.{index}"] = sum(x.stored.nbytes for x in layers)
    tensors = [*network.parameters(), *network.buffers()]
    return blocks, sum(x.nbytes for x in tensors) - sum(blocks.values())


def plan_of(network, share):
    """A plan with about this share of the blocks' bytes on the device."""
    blocks, rest = sizes(network)
    return plan_swap(blocks, rest, rest + share * sum(blocks.values()))
