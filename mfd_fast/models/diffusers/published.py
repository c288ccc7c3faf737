"""Published models by a short name: where they lie and how large they are, from their public
configurations; no weights.

Sizes of text encoders are numbers of parameters in 10^9, counted on the configurations of their
own models.  ``krea2`` has the defaults of diffusers' class: its own configuration was not at hand.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

CLIP_L, CLIP_G, T5 = 0.1237, 0.6947, 4.7623  # T5 XXL, its encoder
T5_11B = 4.8648  # its encoder
UMT5, GEMMA2, LLAMA3 = 5.6809, 2.6143, 8.0303  # XXL, its encoder; 2 B; 8 B
GLM4 = 8.7792  # 9 B, without its head
QWEN3, QWEN3_8B, QWEN25_VL, QWEN3_VL = 4.0225, 8.1907, 8.2922, 4.4378  # 4 and 8, 7, 4 B
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SD3 = {
    **{"sample_size": 128, "attention_head_dim": 64, "joint_attention_dim": 4096},
    **{"pooled_projection_dim": 2048, "qk_norm": "rms_norm", "pos_embed_max_size": 192},
}
HIDREAM = {
    **{"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096]},
    **{"attention_head_dim": 128, "num_attention_heads": 20, "num_layers": 16},
    **{"num_single_layers": 32, "text_emb_dim": 2048, "axes_dims_rope": (64, 32, 32)},
    **{"max_resolution": (128, 128), "llama_layers": [*range(32), *[31] * 16]},
}


class Published(NamedTuple):
    """model: hub id; network: its configuration where it is another than the class's defaults;
    encoders: parameters, 10^9; vae: class and configuration; options: of the pipeline; settings:
    size of what it makes, where that is another than its call's default, and of videos always.
    """

    model: str
    pipeline: str
    network: dict[str, Any]
    encoders: float
    vae: tuple[str, dict[str, Any]] = ("AutoencoderKL", KL | {"latent_channels": 16})
    revision: str = ""
    options: Mapping[str, Any] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})


def _sd3(name: str, encoders: float = CLIP_L + CLIP_G + T5, **network: Any) -> Published:
    name = f"stabilityai/stable-diffusion-{name}"
    return Published(name, "StableDiffusion3Pipeline", SD3 | network, encoders)


def _flux2(name: str, pipeline: str, encoders: float, **network: Any) -> Published:
    name = f"black-forest-labs/FLUX.2-{name}"
    return Published(name, pipeline, network, encoders, ("AutoencoderKLFlux2", {}))


def _klein(name: str, encoders: float, layers: int, single: int, heads: int, text: int):
    return _flux2(
        f"klein-base-{name}",
        "Flux2KleinPipeline",
        encoders,
        num_layers=layers,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=text,
        guidance_embeds=False,
    )


def _wan(name: str, heads: int, hidden: int, layers: int, **more: Any) -> Published:
    network = {"num_attention_heads": heads, "ffn_dim": hidden, "num_layers": layers}
    network |= more.pop("network", {})
    name = f"Wan-AI/Wan{name}-Diffusers"
    more = {"vae": ("AutoencoderKLWan", {}), "settings": {"frames": 81}} | more
    return Published(name, "WanPipeline", network, UMT5, **more)


def _cosmos2(name: str, heads: int, layers: int) -> Published:
    network = {"num_attention_heads": heads, "num_layers": layers, "extra_pos_embed_type": None}
    network |= {"rope_scale": (1.0, 4.0, 4.0)}
    name, pipeline = f"nvidia/Cosmos-Predict2-{name}-Text2Image", "Cosmos2TextToImagePipeline"
    return Published(name, pipeline, network, T5_11B, ("AutoencoderKLWan", {}))


WAN22_VAE = {
    **{"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True},
    **{"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
    **{"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},  # as many; an estimate has no values
}
COGVIEW4_VAE = KL | {
    **{"block_out_channels": (128, 512, 1024, 1024), "layers_per_block": 3, "latent_channels": 16},
    **{"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
}
KANDINSKY5 = {"in_visual_dim": 16, "out_visual_dim": 16}
QWEN_VAE = ("AutoencoderKLQwenImage", {})
PUBLISHED = {
    "sd3-medium": _sd3(
        "3-medium-diffusers",
        **{"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        qk_norm=None,
    ),
    "sd3.5-medium": _sd3(
        "3.5-medium",
        **{"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        **{"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
    ),
    "sd3.5-large": _sd3(
        "3.5-large",
        **{"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
    ),
    "flux1-dev": Published(
        *("black-forest-labs/FLUX.1-dev", "FluxPipeline", {"guidance_embeds": True}, CLIP_L + T5)
    ),
    "flux2-dev": _flux2("dev", "Flux2Pipeline", 24.01),  # Mistral Small 3 with its vision part
    "flux2-klein-4b": _klein("4B", QWEN3, 5, 20, 24, 7680),
    "flux2-klein-9b": _klein("9B", QWEN3_8B, 8, 24, 32, 12288),
    "qwen-image": Published("Qwen/Qwen-Image", "QwenImagePipeline", {}, QWEN25_VL, QWEN_VAE),
    "z-image": Published("Tongyi-MAI/Z-Image", "ZImagePipeline", {}, QWEN3),
    "lumina2": Published(
        *("Alpha-VLLM/Lumina-Image-2.0", "Lumina2Pipeline", {"cap_feat_dim": 2304}, GEMMA2)
    ),
    "auraflow": Published(
        *("fal/AuraFlow-v0.3", "AuraFlowPipeline", {"pos_embed_max_size": 9216}, 1.2236),
        ("AutoencoderKL", KL),
    ),
    "chroma": Published("lodestones/Chroma1-HD", "ChromaPipeline", {}, T5),
    "cogview4": Published(
        *("THUDM/CogView4-6B", "CogView4Pipeline"),
        {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
        *(GLM4, ("AutoencoderKL", COGVIEW4_VAE)),
    ),
    "hidream": Published(
        *("HiDream-ai/HiDream-I1-Full", "HiDreamImagePipeline", HIDREAM),
        CLIP_L + CLIP_G + T5 + LLAMA3,
    ),
    "bria": Published(
        *("briaai/BRIA-3.2", "BriaPipeline"),
        {
            **{"in_channels": 16, "num_layers": 8, "num_single_layers": 28},
            **{"attention_head_dim": 96, "num_attention_heads": 24, "joint_attention_dim": 4096},
            **{"pooled_projection_dim": None, "axes_dims_rope": [0, 48, 48]},
        },
        *(T5, ("AutoencoderKL", KL), "bria_3_2_diffusers"),
    ),
    "wan2.1-1.3b": _wan("2.1-T2V-1.3B", 12, 8960, 30),
    "wan2.1-14b": _wan("2.1-T2V-14B", 40, 13824, 40),
    "wan2.2-5b": _wan(
        *("2.2-TI2V-5B", 24, 14336, 30),
        network={"in_channels": 48, "out_channels": 48},
        vae=("AutoencoderKLWan", WAN22_VAE),
        options={"expand_timesteps": True},
        settings={"resolution": "704x1280", "frames": 121},
    ),
    "wan2.2-a14b": _wan("2.2-T2V-A14B", 40, 13824, 40, options={"boundary_ratio": 0.875}),
    "hunyuan-video": Published(
        *("hunyuanvideo-community/HunyuanVideo", "HunyuanVideoPipeline", {}, LLAMA3 + CLIP_L),
        vae=("AutoencoderKLHunyuanVideo", {}),
        settings={"frames": 129},
    ),
    "ltx-2b": Published(
        *("Lightricks/LTX-Video", "LTXPipeline", {}, T5, ("AutoencoderKLLTXVideo", {})),
        settings={"frames": 161},
    ),
    "kandinsky5-t2i": Published(
        *("kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", "Kandinsky5T2IPipeline"),
        KANDINSKY5
        | {"model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50, "axes_dims": (32, 48, 48)},
        QWEN25_VL + CLIP_L,
    ),
    "kandinsky5-t2v": Published(
        *("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", "Kandinsky5T2VPipeline"),
        KANDINSKY5 | {"model_dim": 1792, "ff_dim": 7168, "visual_cond": True},
        *(QWEN25_VL + CLIP_L, ("AutoencoderKLHunyuanVideo", {})),
        settings={"frames": 121},
    ),
    "sana-video-2b": Published(
        *("Efficient-Large-Model/SANA-Video_2B_480p_diffusers", "SanaVideoPipeline"),
        *({}, GEMMA2, ("AutoencoderKLWan", {})),
        settings={"frames": 81},
    ),
    "mochi": Published(
        *("genmo/mochi-1-preview", "MochiPipeline", {}, T5, ("AutoencoderKLMochi", {})),
        settings={"frames": 19},
    ),
    "krea2": Published("krea/Krea-2-Raw", "Krea2Pipeline", {}, QWEN3_VL, QWEN_VAE),
    "omnigen": Published(
        *("Shitao/OmniGen-v1-diffusers", "OmniGenPipeline"),
        {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
        *(0.0, ("AutoencoderKL", KL)),
    ),
    "cosmos2-2b": _cosmos2("2B", 16, 28),
    "cosmos2-14b": _cosmos2("14B", 40, 36),
}


def preset_of(model: str) -> str | None:
    """The short name of the model that has this hub id, or None."""
    return next((name for name, known in PUBLISHED.items() if known.model == model), None)


def published(model: str) -> Published | None:
    """The model that has this hub id, or None."""
    return PUBLISHED.get(preset_of(model))
