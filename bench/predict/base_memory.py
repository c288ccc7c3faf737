"""Predicted and measured memory of a cycle on a frozen base of 0.3 B parameters, by its format.

A FLUX of six blocks, its weights zeros, one image of 128 x 128 an update, blocks recomputed;
measured as ``predicted_memory`` does: growth of the RSS of a process of its own, at its highest.
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.predict.predicted_memory import SMALL_HEAP, Case, compared, measured, predicted
from bench.running import Options, elsewhere
from mfd_fast.backbones.quantized import FORMATS, freeze_linears
from mfd_fast.models.diffusers.backbone import backbone_of
from mfd_fast.models.diffusers.checkpoint import pipeline_with
from mfd_fast.models.diffusers.family import family_of, named
from mfd_fast.run.task import Shapes

NETWORK = {
    **{"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 12},
    **{"joint_attention_dim": 512, "guidance_embeds": True},
}
SIDE, TOKENS = 128, 16  # pixels of the image, tokens of the text


def flux(base: str, device: str) -> Shapes:
    """The backbone in bf16 with its blocks in a format; only on ``meta`` is it whole before."""
    import diffusers

    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(**NETWORK).to(torch.bfloat16)
    if base != "bf16":
        freeze_linears(named(transformer), r"transformer\.\w*blocks\.\d+", base)
    if device != "meta":
        transformer.to_empty(device=device)
        for x in (*transformer.parameters(), *transformer.buffers()):
            x.data.zero_()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = pipeline_with("FluxPipeline", transformer=transformer, scheduler=scheduler)
    family = family_of(pipe, height=SIDE, width=SIDE)
    family.text_length = TOKENS
    backbone = backbone_of(family, rank=16, activation="block")
    return Shapes(backbone, family.blank)


def parameters() -> int:
    """Of the network."""
    return sum(x.numel() for x in flux("bf16", "meta").backbone.network.transformer.parameters())


def measured_base(base: str) -> int:
    """Bytes, in this process."""
    return measured(Case(partial(flux, base), 1, guidance=1.0))


def row(base: str) -> dict:
    """Both numbers of one format, in megabytes."""
    parts = predicted(Case(partial(flux, base), 1, guidance=1.0))
    return {"base": base} | compared(parts, elsewhere(measured_base, base, **SMALL_HEAP))


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    config = {"parameters": parameters(), "side": SIDE, "text": TOKENS, **NETWORK}
    return "base_memory", config, ([row(base)] for base in FORMATS if options.wants(base))
