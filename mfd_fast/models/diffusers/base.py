"""The frozen base of a pipeline's run: in which format, how much of it on the device, loaded so."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from mfd_fast.backbones.quantized import COMPARED, check_format, freeze_linears
from mfd_fast.backbones.swap import SwapPlan, plan_swap
from mfd_fast.hub import fetch
from mfd_fast.models.diffusers.checkpoint import INDEX, network_class
from mfd_fast.models.diffusers.family import Family, named
from mfd_fast.models.diffusers.presets import PipelineRun
from mfd_fast.models.diffusers.shapes import stored_of


def free_memory(device: torch.device | str) -> float:
    """Bytes that are free on the device; on a CPU, of the machine."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024.0 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def swap_plan(config: PipelineRun, family: Family) -> SwapPlan | None:
    """Which blocks live on the host, None if all fit into ``pipeline.base_memory``.

    ``ValueError`` says which memory it takes, or that the host has too little.
    """
    if not config.pipeline.base_memory:
        return None
    stored = stored_of(family, config.pipeline)
    plan = plan_swap(stored.blocks, stored.rest, stored.budget)
    return plan if plan.swapped else None


def describe(config: PipelineRun, family: Family, plan: SwapPlan | None) -> str:
    """The base in words with its sizes."""
    settings, dtype = config.pipeline, getattr(torch, config.pipeline.dtype)
    blocks, rest = (stored := stored_of(family, settings)).blocks, stored.rest
    plain = sum(x.numel() for x in family.pipe.transformer.parameters()) * dtype.itemsize
    said = f"{settings.base}, {(sum(blocks.values()) + rest) / 1e9:.3g} GB"
    said += f" ({plain / 1e9:.3g} GB in {settings.dtype})" * (settings.base != "bf16")
    if plan is not None:
        said += f"; {len(plan.swapped)} of {len(blocks)} blocks on the host, "
        said += f"{plan.host_bytes / 1e9:.3g} GB, and {plan.resident / 1e9:.3g} GB on the device"
    return said


def check_host(plan: SwapPlan) -> None:
    """``ValueError`` if the host lacks the memory for the blocks that live there."""
    free = free_memory("cpu")
    if plan.host_bytes > free:
        raise ValueError(
            f"{plan.host_bytes / 1e9:.3g} GB of the base would live in the host's memory, and "
            f"{free / 1e9:.3g} GB of it are free: raise --base-memory by "
            f"{math.ceil((plan.host_bytes - free) / 1e8) / 10:g} GB, or take a smaller --base"
        )


def chosen(config: PipelineRun, device: torch.device) -> PipelineRun:
    """The config with a format in the place of ``auto``: the largest with which a run fits.

    ``ValueError`` if none does, with what would.
    """
    from mfd_fast.cost.plans import cycle_of, memory_of, on_base

    if config.pipeline.base != "auto":
        return config
    free, plain = free_memory(device), cycle_of(config, config.train.batch_size)
    for base in COMPARED:
        one = replace(config, pipeline=replace(config.pipeline, base=base))
        cycle = on_base(plain, one.stored(), config, config.train.activation)
        memory = memory_of(cycle, is_captured=False, has_context=False)
        if sum(memory.values()) <= free:
            return one
    most = free - sum(memory.values()) + memory["weights"]
    most = math.floor(most / 1e7) / 100
    offer = f"--base {base} --base-memory {most:g}" if most > 0 else "a larger device"
    raise ValueError(
        f"base auto: even with {base} a run takes {sum(memory.values()) / 1e9:.3g} GB (predicted), "
        f"and {free / 1e9:.3g} GB are free; --train.activation block takes less, and so does "
        f"{offer}"
    )


def quantized_network(
    config: PipelineRun, index: dict[str, Any], device: torch.device
) -> dict[str, nn.Module]:
    """The run's transformer with its blocks in ``pipeline.base``, by its name in the pipeline."""
    settings, folder = config.pipeline, Path(config.teacher)
    if not (folder / INDEX).is_file():
        folder = fetch(config.teacher, settings.revision or None, ["transformer/*"])
    network = load_network(
        folder / "transformer",
        network_class(index["_class_name"]),
        Family.blocks,
        base=settings.base,
        dtype=getattr(torch, settings.dtype),
        device=device,
        variant=settings.variant,
    )
    return {"transformer": network}


def load_network(
    folder: Path,
    cls: Any,
    blocks: str,
    *,
    base: str,
    dtype: torch.dtype,
    device: torch.device | str,
    variant: str = "",
) -> nn.Module:
    """The network of a checkpoint's folder on the CPU, its blocks quantised on ``device`` tensor by
    tensor: what is never held is the whole of it in ``dtype``.

    ``ValueError`` names a tensor that the files lack.
    """
    from accelerate import init_empty_weights

    check_format(base)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            network = cls.from_config(cls.load_config(folder))
    finally:
        torch.set_default_dtype(default)
    frozen = freeze_linears(named(network), blocks, base)
    frozen = {name.removeprefix("transformer."): layer for name, layer in frozen.items()}
    for layer in frozen.values():
        layer.to_empty(device="cpu")
    wide = set(cls._keep_in_fp32_modules or ())
    missing = {name for name, _ in network.named_parameters()}
    files = [path for path in folder.glob("*.safetensors") if _is_variant(path, variant)]
    for path in sorted(files):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                owner, _, last = key.rpartition(".")
                if owner in frozen and last == "weight":
                    frozen[owner].store(tensor.to(device, dtype))
                    missing.discard(f"{owner}.stored")
                    continue
                as_dtype = torch.float32 if wide & set(key.split(".")) else dtype
                _put(network.get_submodule(owner), last, tensor.to(as_dtype))
                missing.discard(key)
    if missing:
        raise ValueError(f"the weights in {folder} lack {sorted(missing)[:3]}; copy them again")
    return network.eval().requires_grad_(False)


def _is_variant(path: Path, variant: str) -> bool:
    parts = path.name.removesuffix(".safetensors").split("-00")[0].split(".")
    return parts[1:] == ([variant] if variant else [])


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    elif name in module._buffers:
        module._buffers[name] = tensor
