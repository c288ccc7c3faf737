"""A teacher that is network + LoRA: what diffusers' own loader made of any file becomes weights.

The loader knows every family's conventions; what it put into the model through PEFT is read from
there, taken out, and added to the weights, or kept beside those that are quantised.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mfd_fast.backbones.quantized import FrozenLinear
from mfd_fast.models.sana.lora_files import Lora, merge_lora


def merge_teacher_lora(pipe: Any, files: str | Mapping[str, float] | None) -> Lora | None:
    """Make network + LoRA the network; the LoRA with strengths folded in, or None without one.

    Args:
        files: a LoRA file, or several with their weights; None: what is active in the pipeline.
    """
    if files is not None and getattr(pipe, "transformer_2", None) is not None:
        raise ValueError("a teacher of two networks takes no LoRA: put it into their weights")
    if files is not None:
        weights = {files: 1.0} if isinstance(files, str) else dict(files)
        names = [f"teacher_{number}" for number in range(len(weights))]
        for name, file in zip(names, weights, strict=True):
            _load(pipe, file, name)
        pipe.transformer.set_adapters(names, list(weights.values()))
    lora = _of_peft(pipe.transformer)
    if lora is not None:
        pipe.transformer.unload_lora()
        frozen = {
            name: layer
            for name, layer in pipe.transformer.named_modules()
            if isinstance(layer, FrozenLinear) and name in lora.factors
        }
        for name, layer in frozen.items():
            layer.add_lora(*lora.factors[name])
        rest = {name: pair for name, pair in lora.factors.items() if name not in frozen}
        merge_lora(pipe.transformer, Lora(rest))
    return lora


def _load(pipe: Any, file: str, name: str) -> None:
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(file, adapter_name=name)
    else:
        pipe.transformer.load_lora_adapter(file, adapter_name=name)


@torch.no_grad()
def _of_peft(transformer: Any) -> Lora | None:
    """The sum of the active adapters of every layer; ``ValueError`` for other kinds than LoRA."""
    made: Lora | None = None
    for name, module in transformer.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            if adapter not in module.active_adapters or module.disable_adapters:
                continue
            if module.use_dora[adapter]:
                raise ValueError(f"{name} has a DoRA; merge it into the checkpoint")
            scale = module.scaling[adapter]
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            one = Lora({name: (a.float().cpu(), b.float().cpu() * scale)})
            made = one if made is None else one.stacked_on(made)
    return made
