"""Real transformers of diffusers without storage, and the work of a published LoRA training step.

Configurations are those of the checkpoints; what is not named is the class's default.  A step is
one forward and one backward of factors that PEFT puts on the attention's linear layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from bench.updates.sana_sizes import SIZES
from mfd_fast.cost.trace import Trace, Work

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BF16 = torch.bfloat16
FLUX_AXES = 3  # coordinates of a token


@dataclass(frozen=True)
class Network:
    """A class of diffusers, its configuration, and how it is called.

    inputs: (batch, latent sides, text tokens) -> keyword arguments; targets: layers with factors.
    """

    kind: str
    inputs: Callable[[int, tuple[int, ...], int], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ATTENTION

    def make(self) -> nn.Module:
        """The frozen transformer in bfloat16, on ``meta``."""
        with torch.device("meta"):
            network = getattr(diffusers, self.kind)(**self.config).to(BF16)
        return network.requires_grad_(False)


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _images(channels: int, width: int, pooled: int = 0, mask: str = "", reads_lengths=False):
    """Latents ``[B, C, *sides]``, text ``[B, L, width]``; a mask by its name."""

    def inputs(batch: int, sides: tuple[int, ...], length: int) -> dict[str, Any]:
        given = {
            "hidden_states": _empty(batch, channels, *sides),
            "encoder_hidden_states": _empty(batch, length, width),
            "timestep": _empty(batch),
        }
        if pooled:
            given["pooled_projections"] = _empty(batch, pooled)
        if mask:
            device = "cpu" if reads_lengths else "meta"
            given[mask] = torch.ones(batch, length, dtype=torch.int64, device=device)
        return given

    return inputs


def _packed(width: int, pooled: int = 0, guidance: bool = False, mask: bool = False):
    """Tokens ``[B, N, 64]`` of 2 x 2 latents with their coordinates, as FLUX and its kin."""

    def inputs(batch: int, sides: tuple[int, ...], length: int) -> dict[str, Any]:
        tokens = sides[0] * sides[1] // 4
        given = {
            "hidden_states": _empty(batch, tokens, 64),
            "encoder_hidden_states": _empty(batch, length, width),
            "timestep": _empty(batch),
            "img_ids": _empty(tokens, FLUX_AXES),
            "txt_ids": _empty(length, FLUX_AXES),
        }
        if pooled:
            given["pooled_projections"] = _empty(batch, pooled)
        if guidance:
            given["guidance"] = _empty(batch)
        if mask:
            given["attention_mask"] = _empty(batch, length + tokens)
        return given

    return inputs


def _qwen(batch: int, sides: tuple[int, ...], length: int) -> dict[str, Any]:
    return {
        "hidden_states": _empty(batch, sides[0] * sides[1] // 4, 64),
        "encoder_hidden_states": _empty(batch, length, 3584),
        "timestep": _empty(batch),
        "img_shapes": [[(1, sides[0] // 2, sides[1] // 2)]] * batch,
    }


def _krea(batch: int, sides: tuple[int, ...], length: int) -> dict[str, Any]:
    tokens = sides[0] * sides[1] // 4
    return {
        "hidden_states": _empty(batch, tokens, 64),
        "encoder_hidden_states": _empty(batch, length, 12, 2560),
        "timestep": _empty(batch),
        "position_ids": _empty(length + tokens, FLUX_AXES),
    }


def _z_image(batch: int, sides: tuple[int, ...], length: int) -> dict[str, Any]:
    return {
        "x": [_empty(16, 1, *sides) for _ in range(batch)],
        "t": _empty(batch),
        "cap_feats": [_empty(length, 2560) for _ in range(batch)],
    }


def _ltx(batch: int, sides: tuple[int, ...], length: int) -> dict[str, Any]:
    frames, height, width = sides
    return {
        "hidden_states": _empty(batch, frames * height * width, 128),
        "encoder_hidden_states": _empty(batch, length, 4096),
        "timestep": _empty(batch),
        "encoder_attention_mask": torch.ones(batch, length, dtype=torch.int64, device="meta"),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


NETWORKS = {
    "sana-1.6b": Network(
        "SanaTransformer2DModel",
        _images(32, 2304, mask="encoder_attention_mask"),
        SIZES["1.6b"].transformer,
    ),
    "sd3.5-medium": Network(
        "SD3Transformer2DModel",
        _images(16, 4096, pooled=2048),
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 384, "qk_norm": "rms_norm",
         "dual_attention_layers": tuple(range(13))},
    ),
    "qwen-image": Network("QwenImageTransformer2DModel", _qwen),
    "z-image": Network("ZImageTransformer2DModel", _z_image),
    "lumina2": Network(
        "Lumina2Transformer2DModel",
        _images(16, 2304, mask="encoder_attention_mask", reads_lengths=True),
        {"cap_feat_dim": 2304},
    ),
    "auraflow": Network(
        "AuraFlowTransformer2DModel",
        _images(4, 2048),
        {"pos_embed_max_size": 9216},
        (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "ltx-video-0.9.5": Network("LTXVideoTransformer3DModel", _ltx),
    "longcat-image": Network(
        "LongCatImageTransformer2DModel",
        _packed(3584),
        {"num_layers": 10, "num_single_layers": 20},
    ),
    "chroma": Network("ChromaTransformer2DModel", _packed(4096, mask=True)),
    "krea2": Network("Krea2Transformer2DModel", _krea),
    "flux.1-dev": Network(
        "FluxTransformer2DModel",
        _packed(4096, pooled=768, guidance=True),
        {"guidance_embeds": True},
    ),
    "wan2.1-1.3b": Network(
        "WanTransformer3DModel",
        _images(16, 4096),
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "wan2.1-14b": Network("WanTransformer3DModel", _images(16, 4096)),
}  # fmt: skip


@contextmanager
def autocast() -> Iterator[None]:
    """What CUDA's autocast to bfloat16 does to linear layers and norms; there is none for meta."""
    linear, convolution, layer_norm = F.linear, F.conv2d, F.layer_norm

    def in_float32(x: Tensor, shape: Any, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
        return layer_norm(x.float(), shape, weight, bias, eps)

    F.linear = lambda x, weight, bias=None: linear(x.to(weight.dtype), weight, bias)
    F.conv2d = lambda x, weight, *rest: convolution(x.to(weight.dtype), weight, *rest)
    F.layer_norm = in_float32
    try:
        yield
    finally:
        F.linear, F.conv2d, F.layer_norm = linear, convolution, layer_norm


@dataclass(frozen=True)
class Step:
    """What a training step does.

    work: of forward and backward; kept: bytes alive at the highest point, above the weights;
    weights, factors: bytes of the frozen and of the trained parameters; tensors: trained ones.
    """

    work: Work
    kept: int
    weights: int
    factors: int
    tensors: int


def traced_step(
    name: str, batch: int, sides: tuple[int, ...], length: int, rank: int, *, checkpoints: bool
) -> Step:
    """Forward and backward of one LoRA step; ``checkpoints``: every block is computed twice."""
    network = NETWORKS[name].make()
    weights = sum(p.nbytes for p in network.parameters())
    network.add_adapter(LoraConfig(r=rank, target_modules=list(NETWORKS[name].targets)))
    network.to("meta", BF16)  # PEFT leaves its factors on the CPU
    trained = [p for p in network.parameters() if p.requires_grad]
    network.train()
    if checkpoints:
        network.enable_gradient_checkpointing()
    given = NETWORKS[name].inputs(batch, sides, length)
    with autocast(), Trace() as trace:
        out = network(**given, return_dict=False)[0]
        out = torch.stack(out) if isinstance(out, list) else out
        (out.float() - torch.empty_like(out, dtype=torch.float32)).square().mean().backward()
    return Step(
        trace.work[""],
        max(trace.memory.peak.values()),
        weights,
        sum(p.nbytes for p in trained),
        len(trained),
    )
