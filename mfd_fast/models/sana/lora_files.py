"""LoRA files of SANA: every convention in, diffusers' keys and ComfyUI's out at strength 1.

A LoRA adds scale * B A to the weight of a layer, A ``[r, in]``, B ``[out, r]``, both with two axes
of length 1 behind if the layer is a 1x1 convolution; scale = alpha / r.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.models.sana.lora_layers import COMFYUI, DIFFUSERS, layers_of, original_layer
from mfd_fast.models.sana.lora_strength import METADATA_KEY, Strengths

# The releases of diffusers in which every layer of the files written here was tested at strength 1.
TESTED_DIFFUSERS = ("0.37.1", "0.39.0", "0.42.1")
DOWN_UP = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))
ALPHA = ".alpha"
MAX_NAMED = 3


@dataclass(frozen=True)
class Lora:
    """Factors by module name, ``{name: (A, B)}`` float32, each with its scale folded into B."""

    factors: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, bank: AdapterBank, name: str) -> "Lora":
        """A trained adapter of a bank."""
        state = bank.adapter_state_dict(name, prefix="")
        modules = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
        scale = bank.scale(name)
        return cls(
            {
                m: (state[f"{m}.lora_A.weight"].cpu(), state[f"{m}.lora_B.weight"].cpu() * scale)
                for m in modules
            }
        )

    def stacked_on(self, base: "Lora") -> "Lora":
        """One LoRA that adds what both add: the ranks of shared layers add up."""
        both = dict(base.factors)
        for name, (a, b) in self.factors.items():
            if name in both:
                first_a, first_b = both[name]
                a = torch.cat([first_a, a.reshape(len(a), *first_a.shape[1:])])
                b = torch.cat([first_b, b.reshape(*b.shape[:2], *first_b.shape[2:])], dim=1)
            both[name] = (a, b)
        return Lora(both)


def save_diffusers_lora(lora: Lora, path: str | Path, *, description: str) -> None:
    """Write the file that ``SanaPipeline.load_lora_weights`` takes as it is.

    Every layer has the largest rank of all, filled up with zeros, and alpha is that rank: readers
    of the metadata and readers that ignore it give strength 1 (diffusers up to 0.39 takes alpha of
    the first layer for all where ranks differ).

    Args:
        lora: to be written.
        path: of the file.
        description: what it adds to which model, for its metadata.
    """
    rank = max(len(a) for a, _ in lora.factors.values())
    state = {}
    for name, (a, b) in lora.factors.items():
        more = rank - len(a)
        a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
        b = torch.cat([b, b.new_zeros(len(b), more, *b.shape[2:])], dim=1)
        state[f"{DIFFUSERS}{name}.lora_A.weight"] = a.contiguous()
        state[f"{DIFFUSERS}{name}.lora_B.weight"] = b.contiguous()
    config = {"r": rank, "lora_alpha": rank, "target_modules": sorted(lora.factors)}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}  # diffusers up to 0.39 asks for them
    config = {f"{DIFFUSERS}{key}": value for key, value in config.items()}
    save_file(state, path, metadata=_header(description) | {METADATA_KEY: json.dumps(config)})


def save_comfyui_lora(
    lora: Lora,
    path: str | Path,
    *,
    description: str,
    wholes: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """The same under ComfyUI's keys ``diffusion_model.LAYER.lora_{down,up}.weight``, alpha = r.

    Layers that are one there (qkv, kv) get stacked A and block-diagonal B, with zeros for those
    that have no adapter.

    Args:
        wholes: ComfyUI's layer -> those of the LoRA that are it; SANA's if None.

    ``ValueError`` names a layer that SANA does not have.
    """
    wholes = dict(map(original_layer, lora.factors)) if wholes is None else wholes
    state = {}
    for theirs, parts in wholes.items():
        a, b = _fused([lora.factors.get(part) for part in parts])
        key = f"{COMFYUI}{theirs}"
        state[f"{key}.lora_down.weight"] = a.contiguous()
        state[f"{key}.lora_up.weight"] = b.contiguous()
        state[f"{key}{ALPHA}"] = torch.tensor(float(len(a)))
    save_file(state, path, metadata=_header(description))


def _header(description: str) -> dict[str, str]:
    return {"format": "pt", "description": description}


def _fused(parts: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """One layer of several with the same input and as many rows each."""
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    rows = next(len(part[1]) for part in parts if part is not None)
    b = torch.block_diag(*(torch.zeros(rows, 0) if p is None else p[1] for p in parts))
    return torch.cat([p[0] for p in parts if p is not None]), b


def read_lora(path: str | Path) -> Lora:
    """A LoRA file of diffusers, PEFT, sd-scripts, OneTrainer or ComfyUI; safetensors only.

    Keys: ``...lora_A.weight`` and ``lora_B``, or ``lora_down`` and ``lora_up``, under diffusers'
    names or the original's.  Strength: see :mod:`.lora_strength`.

    Raises:
        FileNotFoundError, ValueError: the file is missing, broken, of another kind, or does not say
            its strength, by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA file {path}; give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); only safetensors are read"
        ) from error
    alphas = {
        key.removesuffix(ALPHA): _alpha(path, key, state.pop(key))
        for key in list(state)
        if key.endswith(ALPHA)
    }
    names_alpha = any(key.startswith(COMFYUI) or ".lora_down." in key for key in state)
    pairs = _pairs(path, state)
    if state or alphas.keys() - pairs.keys() or not pairs:
        left = sorted([*state, *(f"{stem}{ALPHA}" for stem in alphas.keys() - pairs.keys())])
        raise ValueError(
            f"{path} is no LoRA of linear layers alone (MODULE.lora_A.weight and lora_B, or "
            f"lora_down and lora_up): it has {left[:MAX_NAMED] or 'no factors'}; DoRA, biases and "
            "other kinds are not read, merge them into the checkpoint"
        )
    ranks = {stem: len(a) for stem, (a, _) in pairs.items()}
    strengths = Strengths.of(path, metadata, alphas, ranks, names_alpha=names_alpha)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for stem, (a, b) in pairs.items():
        layers = layers_of(stem)
        if len(b) % len(layers) or factors.keys() & set(layers):
            raise ValueError(
                f"{path}: {stem} is {', '.join(layers)}, and has {len(b)} rows in all or is there "
                "twice; copy it again"
            )
        b = b * strengths.scale(stem, layers[0], len(a))
        factors |= {
            name: (a, rows) for name, rows in zip(layers, b.chunk(len(layers)), strict=True)
        }
    return Lora(factors)


def _alpha(path: Path, key: str, value: Tensor) -> float:
    alpha = float(value) if value.numel() == 1 else float("nan")
    if not 0 < alpha < float("inf"):
        raise ValueError(
            f"{path}: {key} must be a number > 0, got {value.flatten()[:MAX_NAMED].tolist()}: "
            "strength unknown; copy it again"
        )
    return alpha


def _pairs(path: Path, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by stem, taken out of ``state``; ``ValueError`` if one lacks or does not fit."""
    pairs = {}
    for down, up in DOWN_UP:
        for key in [key for key in state if key.endswith(down)]:
            stem = key.removesuffix(down)
            if f"{stem}{up}" not in state:
                raise ValueError(f"{path} has {key} but no {stem}{up}; copy it again")
            a, b = state.pop(key), state.pop(f"{stem}{up}")
            fits = min(a.ndim, b.ndim) >= 2 and len(a) == b.shape[1] and len(a) > 0
            if not fits or a.shape[2:].numel() * b.shape[2:].numel() != 1:
                raise ValueError(
                    f"{path}: {stem} must have factors A [r, in] and B [out, r] of a linear layer "
                    f"or a 1x1 convolution, got {list(a.shape)} and {list(b.shape)}"
                )
            pairs[stem] = (a, b)
    return pairs


@torch.no_grad()
def merge_lora(network: nn.Module, lora: Lora) -> None:
    """Add a LoRA to the network's weights in place, in float32 and then rounded to their dtype.

    ``ValueError`` names the first layers that the network does not have, or of another shape.
    """
    parameters = dict(network.named_parameters())
    wrong = [
        name
        for name, (a, b) in lora.factors.items()
        if f"{name}.weight" not in parameters
        or parameters[f"{name}.weight"].flatten(1).shape != (len(b), a[0].numel())
    ]
    if wrong:
        raise ValueError(
            f"the LoRA does not fit this network: {len(wrong)} of its {len(lora.factors)} layers "
            f"are missing there or of another shape, {wrong[:MAX_NAMED]}; it belongs to another "
            "checkpoint"
        )
    for name, (a, b) in lora.factors.items():
        weight = parameters[f"{name}.weight"]
        delta = b.to(weight.device).flatten(1) @ a.to(weight.device).flatten(1)
        weight.copy_((weight.float() + delta.view_as(weight)).to(weight.dtype))
