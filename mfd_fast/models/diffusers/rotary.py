"""Norm and rotary embedding of queries and keys as one operator, in diffusers' own processors.

A stock processor norms queries and keys by modules of its attention and then rotates them, some ten
operators each.  A fused one is the same processor, which sees an attention whose norms also rotate
(``ops/rms_norm_rotary.py``), and no angles.
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfd_fast.ops.rms_norm_rotary import rms_norm_rotary

# Of FLUX (Chroma has it, too), FLUX.2, Bria, Qwen-Image, Z-Image, Lumina 2, Wan and LTX: all rotate
# the pairs (2 i, 2 i + 1), right after the norm.
PROCESSORS = {
    *("FluxAttnProcessor", "Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
    *("BriaAttnProcessor", "QwenDoubleStreamAttnProcessor2_0", "ZSingleStreamAttnProcessor"),
    *("Lumina2AttnProcessor2_0", "WanAttnProcessor", "LTXVideoAttnProcessor"),
}
ANGLES = ("image_rotary_emb", "rotary_emb", "freqs_cis")  # a processor's argument
IMAGE, TEXT = ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")


class Turning(NamedTuple):
    """An RMS norm that also rotates: x ``[R, T, H, D]``, or ``[R, T, H * D]`` normed as a whole."""

    norm: nn.Module
    cos: Tensor  # [R or 1, T, D / 2]
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.norm.eps is None else self.norm.eps
        heads = x if x.ndim == 4 else x.unflatten(2, (-1, 2 * self.cos.shape[2]))
        out = rms_norm_rotary(
            heads, self.norm.weight, self.cos, self.sin, eps=eps, across=x.ndim == 3
        )
        return out if x.ndim == 4 else out.flatten(2)


class Turned:
    """An attention with some of its norms replaced, for one call."""

    def __init__(self, attention: nn.Module, norms: dict[str, Turning]):
        self.attention, self.norms = attention, norms

    def __getattr__(self, name: str) -> Any:
        norms = self.__dict__["norms"]
        return norms[name] if name in norms else getattr(self.__dict__["attention"], name)


def fuse_rotary(transformer: nn.Module) -> int:
    """Let the attentions of a network rotate as they norm, where their processor is known and their
    norms are RMS norms; how many do.
    """
    count = 0
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if type(processor).__name__ in PROCESSORS and _is_plain(module):
            fused = object.__new__(_fused(type(processor)))
            vars(fused).update(vars(processor))
            module.processor = fused
            count += 1
    return count


def _is_plain(attention: nn.Module) -> bool:
    norms = [norm for name in (*IMAGE, *TEXT) if (norm := getattr(attention, name, None))]
    return bool(norms) and all(
        type(norm).__name__ == "RMSNorm" and getattr(norm, "bias", None) is None for norm in norms
    )


@cache
def _fused(stock: type) -> type:
    signature = inspect.signature(stock.__call__)
    names = tuple(signature.parameters)[2:]  # after self and the attention
    angles_name = next(name for name in ANGLES if name in names)

    def call(self: Any, attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        angles, weight = given.get(angles_name), attention.norm_q.weight
        if angles is None or (weight is not None and weight.dtype != given["hidden_states"].dtype):
            return stock.__call__(self, attention, **given)
        norms = _turning(attention, angles, given.get("encoder_hidden_states"))
        return stock.__call__(self, Turned(attention, norms), **given | {angles_name: None})

    call.__signature__ = signature  # attentions ask it which arguments there are
    return type(f"Fused{stock.__name__}", (stock,), {"__call__": call})


def _turning(attention: nn.Module, angles: Any, text: Tensor | None) -> dict[str, Turning]:
    """The norms of image and text, by the attention's names for them."""
    has_text = text is not None and getattr(attention, TEXT[0], None) is not None
    if isinstance(angles, Tensor):
        image = _tables(angles)
    elif angles[0].is_complex():
        image, of_text = (_tables(part) for part in angles)
    else:
        image = _tables(angles)
        if has_text:  # comes first
            length = text.shape[1]
            of_text = tuple(table[:, :length] for table in image)
            image = tuple(table[:, length:] for table in image)
    turning = {name: Turning(getattr(attention, name), *image) for name in IMAGE}
    if has_text:
        turning |= {name: Turning(getattr(attention, name), *of_text) for name in TEXT}
    return turning


def _tables(angles: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """cos and sin ``[R or 1, T, D / 2]``, views of complex numbers or of tables with each twice."""
    if isinstance(angles, Tensor):
        both = torch.view_as_real(angles).float().unbind(-1)
    else:
        both = angles[0][..., ::2].float(), angles[1][..., ::2].float()
    if both[0].ndim == 4:  # [1, T, 1, D]
        both = tuple(table.squeeze(2) for table in both)
    return tuple(table if table.ndim == 3 else table[None] for table in both)
