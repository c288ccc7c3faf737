"""Weights of an open_clip ViT checkpoint under the names of transformers' ``CLIPModel``."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

# open_clip's names, in the text tower without a prefix.  Longer ones come first.
TOWERS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}
IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# Matrices that open_clip multiplies from the right.
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
NO_WEIGHTS = {"attn_mask"}


def to_transformers_names(tensors: Mapping[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The same weights for ``CLIPModel``: queries, keys and values apart, projections transposed.

    ``ValueError`` names the first tensor of ``file`` that is not one of an open_clip ViT.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if name in OUTSIDE:
            renamed[OUTSIDE[name]] = tensor
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T.contiguous()
        elif (found := _in_block(name, tensor)) is not None:
            renamed |= found
        elif name not in NO_WEIGHTS:
            raise ValueError(
                f"{file} is no checkpoint of an open_clip ViT: it holds {name}; name another file"
            )
    return renamed


def _in_block(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """The tensors of a transformer block that ``name`` stands for; None if it is not one."""
    for prefix, tower in TOWERS.items():
        if not name.startswith(prefix):
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        layer = f"{tower}.encoder.layers.{number}"
        module, _, kind = rest.rpartition(".")
        if module in IN_BLOCK:
            return {f"{layer}.{IN_BLOCK[module]}.{kind}": tensor}
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rpartition("_")[2]
            parts = zip("qkv", tensor.chunk(3), strict=True)
            return {f"{layer}.self_attn.{p}_proj.{kind}": t.clone() for p, t in parts}
    return None
