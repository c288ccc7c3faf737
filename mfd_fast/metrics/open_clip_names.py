"""Weights of an open_clip ViT checkpoint under the names of transformers' ``CLIPModel``."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

NAMES = {  # outside the blocks
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
TRANSPOSED = ("text_projection", "visual.proj")  # open_clip multiplies them from the right
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(ln_1|ln_2|attn|mlp)\.(.+)")
MODULES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn": "self_attn", "mlp": "mlp"}


def to_transformers_names(tensors: Mapping[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The same weights for ``CLIPModel``: queries, keys and values apart, projections transposed.

    ``ValueError`` names the first tensor of ``file`` that is not one of an open_clip ViT.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if name in NAMES:
            renamed[NAMES[name]] = tensor.T.contiguous() if name in TRANSPOSED else tensor
        elif found := BLOCK.fullmatch(name):
            tower = "vision_model" if found[1] else "text_model"
            layer = f"{tower}.encoder.layers.{found[2]}.{MODULES[found[3]]}"
            rest = found[4].replace("c_fc.", "fc1.").replace("c_proj.", "fc2.")
            parts = {rest: tensor}
            if rest.startswith("in_proj_"):
                split = zip("qkv", tensor.chunk(3), strict=True)
                parts = {f"{p}_proj.{rest[len('in_proj_') :]}": t.clone() for p, t in split}
            renamed |= {f"{layer}.{part}": value for part, value in parts.items()}
        elif name != "attn_mask":
            raise ValueError(
                f"{file} is no checkpoint of an open_clip ViT: it holds {name}; name another file"
            )
    return renamed
