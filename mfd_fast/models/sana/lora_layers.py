"""Names of SANA's layers in LoRA files: diffusers', the original code's, and trainers' spellings.

The original code, which ComfyUI runs, has projections of one input as one layer: qkv, kv.
"""

import re

# Layers of a block: diffusers' names, in the order of their rows, and the original's.
BLOCK_LAYERS = (
    (("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.qkv"),
    (("attn1.to_out.0",), "attn.proj"),
    (("attn2.to_q",), "cross_attn.q_linear"),
    (("attn2.to_k", "attn2.to_v"), "cross_attn.kv_linear"),
    (("attn2.to_out.0",), "cross_attn.proj"),
    (("ff.conv_inverted",), "mlp.inverted_conv.conv"),
    (("ff.conv_point",), "mlp.point_conv.conv"),
)
# Layers outside the blocks; of one name there, a checkpoint has the first or (Sprint) the second.
OUTER_LAYERS = (
    ("patch_embed.proj", "x_embedder.proj"),
    ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    ("time_embed.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_embed.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_embed.guidance_embedder.linear_1", "cfg_embedder.mlp.0"),
    ("time_embed.guidance_embedder.linear_2", "cfg_embedder.mlp.2"),
    ("time_embed.linear", "t_block.1"),
    ("proj_out", "final_layer.linear"),
)
DIFFUSERS, COMFYUI, PEFT = "transformer.", "diffusion_model.", "base_model.model."
COMPILED = "_orig_mod."
KOHYA = ("lora_transformer_", "lora_unet_")  # sd-scripts and OneTrainer: "_" in place of "."
PREFIXES = (DIFFUSERS, COMFYUI, PEFT, COMPILED, *KOHYA)
BLOCK = re.compile(r"(?:transformer_)?blocks[._](\d+)[._](.+)")


def _spelled() -> dict[tuple[bool, str], tuple[str, ...]]:
    """(is in a block, name with "_" for ".") -> diffusers' names, for both names of every layer."""
    found = {}
    for ours, theirs in BLOCK_LAYERS:
        found |= {(True, name.replace(".", "_")): (name,) for name in ours}
        found[True, theirs.replace(".", "_")] = ours
    for ours, theirs in OUTER_LAYERS:
        found[False, ours.replace(".", "_")] = (ours,)
        found.setdefault((False, theirs.replace(".", "_")), (ours,))
    return found


SPELLED = _spelled()


def layers_of(stem: str) -> tuple[str, ...]:
    """diffusers' names of what a key of a LoRA file means, several for a fused layer.

    Args:
        stem: the key without its ``.lora_A.weight``; a name that no SANA has comes back as it is.
    """
    name = stem
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    in_block = BLOCK.fullmatch(name)
    rest = in_block.group(2) if in_block else name
    layers = SPELLED.get((in_block is not None, rest.replace(".", "_")))
    if layers is None:
        return (name,)
    block = f"transformer_blocks.{in_block.group(1)}." if in_block else ""
    return tuple(block + layer for layer in layers)


def original_layer(name: str) -> tuple[str, tuple[str, ...]]:
    """The original's name of a layer, and diffusers' of all that it is made of, in row order.

    ``ValueError`` for a layer that SANA does not have.
    """
    in_block = BLOCK.fullmatch(name)
    for ours, theirs in BLOCK_LAYERS:
        if in_block and in_block.group(2) in ours:
            number = in_block.group(1)
            return f"blocks.{number}.{theirs}", tuple(
                f"transformer_blocks.{number}.{layer}" for layer in ours
            )
    for outer, theirs in OUTER_LAYERS:
        if name == outer:
            return theirs, (name,)
    raise ValueError(f"the original SANA has no layer for {name!r}")
