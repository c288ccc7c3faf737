"""A pipeline's run without its weights: what an estimate and the settings need."""

import re
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfd_fast.backbones.networks import find_modules, names_of
from mfd_fast.backbones.quantized import Stored, freeze_linears
from mfd_fast.models.diffusers.backbone import backbone_of
from mfd_fast.models.diffusers.checkpoint import (
    CONFIGS,
    INDEX,
    network_class,
    outline,
    pipeline_with,
    quiet,
    read_index,
)
from mfd_fast.models.diffusers.family import Family, family_of, named
from mfd_fast.models.diffusers.presets import PipelineRun, PipelineSettings
from mfd_fast.models.diffusers.published import Published, published
from mfd_fast.models.diffusers.video import Video, in_tiles
from mfd_fast.run.task import Shapes

BF16_BYTES = 2
FEW = 2  # with one, the memory of a phase could peak at another place than with all


@quiet()
def published_pipeline(model: Published) -> Any:
    """The pipeline of a published model with network and VAE on ``meta`` and nothing else."""
    import diffusers

    vae, options = model.vae
    with torch.device("meta"):
        made = {
            name: network_class(model.pipeline)(**model.network)
            for name in ("transformer", "transformer_2")[: 1 + ("boundary_ratio" in model.options)]
        }
        made["vae"] = getattr(diffusers, vae)(**options)
        made["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipeline_with(model.pipeline, **made, **model.options)


def check_teacher(config: PipelineRun) -> None:
    """``ValueError`` for a run without a model."""
    if not config.teacher:
        raise ValueError(
            "preset pipeline needs a model: mfd-fast distill MODEL --prompts FILE, MODEL the "
            "folder or hub id of a diffusers pipeline"
        )


def outlined(config: PipelineRun) -> Family:
    """The family of a run's pipeline with the network on ``meta``.

    A published model is not looked for; of another hub id only its configurations are fetched.
    ``ValueError`` or ``OSError``: there is no such pipeline, or it cannot be distilled.
    """
    check_teacher(config)
    settings, model = config.pipeline, published(config.teacher)
    if model is not None and not Path(config.teacher).is_dir():
        pipe = published_pipeline(model)
    else:
        pipe = outline(*read_index(config.teacher, settings.revision or None, CONFIGS))
    return family_of(pipe, **options_of(settings))


def pipeline_shapes(config: PipelineRun, device: str) -> Shapes:
    """See :meth:`RunConfig.shapes`; elsewhere than on ``meta`` the weights are zeros."""
    family = outlined(config)
    for network in family.networks.values() if device != "meta" else ():
        network.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.zero_()
    return _shapes(config, family)


def pipeline_terms(config: PipelineRun) -> list[tuple[int, Shapes]]:
    """See :meth:`RunConfig.terms`."""
    return [(n, _shapes(config, few)) for n, few in family_terms(config, outlined(config))]


def family_terms(config: PipelineRun, family: Family) -> list[tuple[int, Family]]:
    """Weights and families that sum to this one: networks with ``FEW`` blocks of every kind, and
    with one more of each kind that has more.
    """
    kinds: dict[Any, list[str]] = {}
    pattern = re.compile(family.blocks)
    for network, whole in family.networks.items():
        for part, block in whole.named_modules():
            if pattern.fullmatch(name := f"{network}.{part}"):
                facts = tuple((key, x.shape) for key, x in block.named_parameters())
                kinds.setdefault((name.rpartition(".")[0], facts), []).append(name)
    few = {name for names in kinds.values() for name in names[:FEW]}
    more = [(len(x) - FEW, few | {x[FEW]}) for x in kinds.values() if len(x) > FEW]
    terms = [(1 - sum(n for n, _ in more), few), *more]
    return [(n, _with_blocks(config, family, kept)) for n, kept in terms if n]


def _with_blocks(config: PipelineRun, family: Family, kept: set[str]) -> Family:
    """The family with these blocks of its networks alone."""
    pipe = copy(family.pipe)
    for network, whole in family.networks.items():
        short = copy(whole)
        short._modules = {name: copy(module) for name, module in whole._modules.items()}
        for stack in {x.rpartition(".")[0].partition(".")[2] for x in kept if within(x, network)}:
            blocks = whole.get_submodule(stack)
            names = (f"{network}.{stack}.{i}" for i in range(len(blocks)))
            few = [block for name, block in zip(names, blocks, strict=True) if name in kept]
            setattr(short, stack, nn.ModuleList(few))
        setattr(pipe, network, deepcopy(short))
    return family_of(pipe, **options_of(config.pipeline))


def within(name: str, network: str) -> bool:
    """Whether a module's name is one of this network."""
    return name.partition(".")[0] == network


@quiet()
def _shapes(config: PipelineRun, family: Family) -> Shapes:
    settings = config.pipeline
    for network in family.networks.values():
        family.cast(network.requires_grad_(False).eval(), getattr(torch, settings.dtype))
        if settings.base not in ("bf16", "auto"):
            for layer in freeze_linears(named(network), family.blocks, settings.base).values():
                layer.stored.zero_()
    backbone = backbone_of(
        family,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=names_of(settings.targets) if settings.targets else None,
        activation=config.train.activation,
        prepares=config.train.shard == "none",
    )
    for network in family.networks.values():
        family.without_values(network)
    if family.has_null:
        family.null_row = family.blank_null()
    return Shapes(backbone, family.blank)


@quiet()
def stored_of(family: Family, settings: PipelineSettings) -> Stored:
    """Bytes of a family's network, which is on ``meta``, in the format of the settings."""
    base, dtype = settings.base.replace("auto", "bf16"), getattr(torch, settings.dtype)
    network = named(deepcopy(family.pipe.transformer))
    family.cast(network["transformer"], dtype)
    layers = freeze_linears(network, family.blocks, base)
    tensors = [*network.parameters(), *network.buffers()]
    blocks = dict.fromkeys(find_modules(network, family.blocks)[0], 0)
    for name, layer in layers.items():
        blocks[next(x for x in blocks if name.startswith(f"{x}."))] += layer.stored.nbytes
    plain = [x.in_features * x.out_features * dtype.itemsize for x in layers.values()]
    rest = sum(x.nbytes for x in tensors) - sum(blocks.values())
    budget = settings.base_memory * 1e9
    return Stored(base, blocks, rest, budget, sum(plain), max(plain), len(layers))


def beside_the_updates(config: PipelineRun) -> dict[str, float]:
    """Bytes of what is on the device between updates only, where its size is known."""
    family = outlined(config)
    decoding = {}
    if isinstance(family, Video):
        family.pipe.vae.to(getattr(torch, config.pipeline.dtype))
        decoding["decoding a video by tiles"] = decoding_bytes(family)
    return _parts_beside(config) | decoding


@torch.no_grad()
def decoding_bytes(family: Video) -> float:
    """The most bytes that the decoding of a video takes beside the weights, as a run does it."""
    from mfd_fast.cost.trace import OUTSIDE, Trace

    vae = family.pipe.vae
    x = torch.empty(1, *family.sample_shape, device="meta")
    with in_tiles(vae), Trace(counts_work=False) as trace:
        family.decoded(family.denormalised(x).to(vae.dtype))
    return float(trace.memory.peak[OUTSIDE])


def _parts_beside(config: PipelineRun) -> dict[str, float]:
    model, folder = published(config.teacher), Path(config.teacher)
    if (folder / INDEX).is_file():
        sizes = {"text encoders": 0.0, "VAE": 0.0}
        for path in folder.glob("*/*.safetensors"):
            if not path.parent.name.startswith("transformer"):
                part = "VAE" if path.parent.name == "vae" else "text encoders"
                sizes[part] += path.stat().st_size
        return sizes
    if model is None:
        return {}
    vae = sum(p.numel() for p in published_pipeline(model).vae.parameters())
    return {"text encoders": model.encoders * 1e9 * BF16_BYTES, "VAE": float(vae * BF16_BYTES)}


def options_of(settings: PipelineSettings) -> dict[str, Any]:
    """The options of :class:`Family` that a run's settings say."""
    height, width = parse_resolution(settings.resolution)
    size = {"height": height, "width": width, "scale": settings.guidance}
    return size | {"frames": settings.frames, "fps": settings.fps}


def parse_resolution(text: str) -> tuple[int | None, int | None]:
    """Height and width of HxW, or of one number for both; None where empty."""
    if not text:
        return None, None
    found = re.fullmatch(r"([1-9]\d{0,5})(?:[xX]([1-9]\d{0,5}))?", text)
    if not found:
        raise ValueError(
            f"pipeline.resolution must be HxW in pixels, such as 1024x768; got {text!r}"
        )
    return int(found.group(1)), int(found.group(2) or found.group(1))


def why_eager(config: PipelineRun, family: Family) -> str:
    """Why the updates cannot be CUDA graphs, if they cannot."""
    from_host = "blocks of the base come from the host" if config.pipeline.base_memory else ""
    return family.why_eager or from_host


def is_smaller(config: PipelineRun) -> bool:
    """Whether the base is quantised, or part of it lies in the host's memory."""
    return config.pipeline.base != "bf16" or config.pipeline.base_memory > 0


def engine_config(config: PipelineRun, family: Family) -> PipelineRun:
    """The config with the guidance as the engine means it, and what the family cannot do off.

    ``ValueError`` for a guidance that was given in the engine's place, or ``train.capture on``.
    """
    distill, train = config.distill, config.train
    if distill.guidance not in (1.0, family.guidance):
        raise ValueError(
            f"distill.guidance follows from the pipeline's scale and must be {family.guidance:g} "
            f"here, got {distill.guidance:g}; give the scale with --guidance"
        )
    if config.pipeline.base != "bf16" and train.float8:
        raise ValueError(
            "train.float8 multiplies copies of the weights themselves: drop --train.float8, or "
            f"take --base bf16, not {config.pipeline.base}"
        )
    if is_smaller(config) and (config.pipeline.compile or train.shard == "fsdp"):
        raise ValueError(
            "pipeline.base and pipeline.base_memory were not tried with compiled or sharded "
            "blocks: leave them out, or pipeline.compile and train.shard fsdp"
        )
    if not family.takes_lora and is_smaller(config):
        raise ValueError(
            f"{type(family.pipe).__name__} loads no LoRA, its student is merged weights: leave out "
            "pipeline.base and pipeline.base_memory"
        )
    if len(family.networks) > 1 and (is_smaller(config) or config.pipeline.compile):
        raise ValueError(
            f"this {type(family.pipe).__name__} has two networks: leave out pipeline.base, "
            "pipeline.base_memory and pipeline.compile, which were tried with one"
        )
    if train.shard == "fsdp" and family.calls_vary:
        raise ValueError(
            f"train.shard must be none for this {type(family.pipe).__name__}: its ranks would call "
            "the network a different number of times, and wait for each other"
        )
    if why := why_eager(config, family):
        if train.capture == "on":
            raise ValueError(f"train.capture must be auto or off here: {why}")
        train = replace(train, capture="off")
    return replace(config, distill=replace(distill, guidance=family.guidance), train=train)
