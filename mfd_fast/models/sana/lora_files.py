"""LoRA files of SANA: diffusers' keys in and out, ComfyUI's keys out.

A LoRA adds scale * B A to the weight of a linear layer, A ``[r, in]``, B ``[out, r]``,
scale = alpha / r.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mfd_fast.adapters import AdapterBank
from mfd_fast.plain_files import parse_json

PREFIX = "transformer."  # what diffusers' pipelines put before the names of the transformer
FOREIGN_PREFIXES = ("base_model.model.", "diffusion_model.", "")  # PEFT's own, others, none
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps r and alpha, as JSON
MAX_NAMED = 3
# ComfyUI has the layers of the original SANA code, where projections of one input are one layer:
# (ours, theirs); the order in a fused layer is that of this list.
COMFY_LAYERS = (
    ("attn1", ("to_q", "to_k", "to_v"), "attn.qkv"),
    ("attn2", ("to_q",), "cross_attn.q_linear"),
    ("attn2", ("to_k", "to_v"), "cross_attn.kv_linear"),
)


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
                a, b = torch.cat([both[name][0], a]), torch.cat([both[name][1], b], dim=1)
            both[name] = (a, b)
        return Lora(both)


def save_diffusers_lora(lora: Lora, path: str | Path) -> None:
    """Write the file that ``SanaPipeline.load_lora_weights`` takes as it is.

    alpha is r for every layer (the scale is inside B), so nothing depends on metadata being read.
    """
    state = {}
    for name, (a, b) in lora.factors.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        state[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(state, path, metadata={"format": "pt"})


def save_comfyui_lora(lora: Lora, path: str | Path) -> None:
    """The same under ComfyUI's keys ``diffusion_model.blocks.N...lora_{down,up}.weight``, alpha.

    Layers that are one there (qkv, kv) get stacked A and block-diagonal B, of two or three times
    the rank.  ``ValueError`` names a layer that ComfyUI's network does not have.
    """
    state, left = {}, dict(lora.factors)
    blocks = sorted(
        {int(m.group(1)) for name in left if (m := re.match(r".*blocks\.(\d+)\.", name))}
    )
    for block in blocks:
        for attention, layers, theirs in COMFY_LAYERS:
            names = [f"transformer_blocks.{block}.{attention}.{layer}" for layer in layers]
            if not all(name in left for name in names):
                continue
            pairs = [left.pop(name) for name in names]
            a, b = torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))
            key = f"diffusion_model.blocks.{block}.{theirs}"
            state[f"{key}.lora_down.weight"] = a.contiguous()
            state[f"{key}.lora_up.weight"] = b.contiguous()
            state[f"{key}.alpha"] = torch.tensor(float(len(a)))
    if left:
        raise ValueError(
            f"ComfyUI's SANA has no layer for {sorted(left)[:MAX_NAMED]}; its file can be written "
            "for adapters on to_q, to_k and to_v together"
        )
    save_file(state, path, metadata={"format": "pt"})


def read_lora(path: str | Path) -> Lora:
    """A LoRA of diffusers or PEFT (``...lora_A.weight``, ``...lora_B.weight``), safetensors only.

    alpha comes from ``.alpha`` entries or from diffusers' metadata; without either it is r.

    Raises:
        FileNotFoundError, ValueError: the file is missing, broken, or of another kind, by name.
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
    alphas = {key: float(state.pop(key)) for key in list(state) if key.endswith(".alpha")}
    factors = {}
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        if f"{stem}.lora_B.weight" not in state:
            raise ValueError(f"{path} has {key} but no {stem}.lora_B.weight; copy it again")
        a, b = state.pop(key), state.pop(f"{stem}.lora_B.weight")
        alpha = alphas.get(f"{stem}.alpha", _alpha_in(metadata, _module(stem), len(a)))
        factors[_module(stem)] = (a.flatten(1), b.flatten(1) * (alpha / len(a)))
    if state or not factors:
        raise ValueError(
            f"{path} is no LoRA in diffusers' layout ({PREFIX}MODULE.lora_A.weight and lora_B): it "
            f"has {sorted(state)[:MAX_NAMED] or 'no factors'}; load it in diffusers and write it "
            "with save_lora_weights"
        )
    return Lora(factors)


def _module(stem: str) -> str:
    for prefix in (PREFIX, *FOREIGN_PREFIXES):
        if stem.startswith(prefix):
            return stem.removeprefix(prefix)
    return stem


def _alpha_in(metadata: Mapping[str, str], module: str, rank: int) -> float:
    """alpha of a layer by diffusers' metadata ``{"transformer.lora_alpha": ...}``; r without it."""
    entries = parse_json(metadata.get(METADATA_KEY, "{}"))
    patterns = entries.get(f"{PREFIX}alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if module == pattern or module.endswith(f".{pattern}"):
            return float(alpha)
    return float(entries.get(f"{PREFIX}lora_alpha", rank))


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
        or parameters[f"{name}.weight"].flatten(1).shape != (b.shape[0], a.shape[1])
    ]
    if wrong:
        raise ValueError(
            f"the LoRA does not fit this network: {len(wrong)} of its {len(lora.factors)} layers "
            f"are missing there or of another shape, {wrong[:MAX_NAMED]}; it belongs to another "
            "checkpoint"
        )
    for name, (a, b) in lora.factors.items():
        weight = parameters[f"{name}.weight"]
        delta = b.to(weight.device) @ a.to(weight.device)
        weight.copy_((weight.float() + delta.view_as(weight)).to(weight.dtype))
