"""A small random pipeline of every family: nothing is downloaded, each takes a moment to build."""

import torch
from tiny_others import OTHERS
from tiny_parts import (
    CHAT,
    FLOW_SIGMAS,
    SHIFTED,
    SIZES,
    clip,
    clip_tokenizer,
    decoder,
    diffusers,
    euler,
    flux2_vae,
    kl_vae,
    qwen_vae,
    qwen_vl,
    t5,
    tokenizer,
    transformers,
)
from tiny_videos import FRAMES, VIDEOS, kandinsky5_parts


def sd3():
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            **{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 3,
            },
            **{"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32},
            **{"joint_attention_dim": 72, "pooled_projection_dim": 64, "pos_embed_max_size": 8},
            **{"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        ),
        scheduler=euler(shift=3.0),
        vae=kl_vae(),
        **{"text_encoder": clip(), "text_encoder_2": clip(), "text_encoder_3": t5(72)},
        **{"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()},
        tokenizer_3=tokenizer("$A </s>"),
    )


def flux1(*, is_dev=True):
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
            },
            **{"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32},
            **{"axes_dims_rope": [4, 4, 8], "guidance_embeds": is_dev},
        ),
        scheduler=euler(**SHIFTED) if is_dev else euler(shift=1.0),
        vae=kl_vae(),
        **{"text_encoder": clip("CLIPTextModel"), "tokenizer": clip_tokenizer()},
        **{"text_encoder_2": t5(), "tokenizer_2": tokenizer("$A </s>")},
    )


def qwen_image():
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            **{"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2},
            **{"attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 16},
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=euler(
            **SHIFTED | {"max_shift": 0.9, "max_image_seq_len": 8192}, shift_terminal=0.02
        ),
        vae=qwen_vae(),
        text_encoder=qwen_vl(),
        tokenizer=tokenizer(),
    )


def lumina2():
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            **{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 24,
                "num_layers": 2,
            },
            **{
                "num_refiner_layers": 1,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 16,
            },
            **{"axes_dim_rope": [4, 4, 4], "axes_lens": [300, 16, 16], "cap_feat_dim": 32},
        ),
        scheduler=euler(shift=6.0),
        vae=kl_vae(),
        text_encoder=decoder("Gemma2Model", 32),
        tokenizer=tokenizer("<s> $A"),
    )


def flux2_network(size, *, is_dev):
    return diffusers.Flux2Transformer2DModel(
        **{"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": size, "axes_dims_rope": [4, 4, 4, 4]},
        guidance_embeds=is_dev,
    )


def flux2_dev():
    """Its processor of text and images is too much to build: numbers of every prompt instead."""
    pipe = diffusers.Flux2Pipeline(
        transformer=flux2_network(16, is_dev=True),
        scheduler=euler(**SHIFTED),
        vae=flux2_vae(),
        text_encoder=None,
        tokenizer=None,
    )

    def embeds(*, prompt, max_sequence_length, **_):
        seeds = (torch.Generator().manual_seed(sum(text.encode())) for text in prompt)
        return torch.stack([torch.randn(max_sequence_length, 16, generator=g) for g in seeds])

    pipe._get_mistral_3_small_prompt_embeds = embeds
    return pipe


def flux2_klein(**options):
    return diffusers.Flux2KleinPipeline(
        transformer=flux2_network(48, is_dev=False),
        scheduler=euler(**SHIFTED),
        vae=flux2_vae(),
        text_encoder=decoder("Qwen3ForCausalLM", num_hidden_layers=28),
        tokenizer=tokenizer(chat_template=CHAT),
        **options,
    )


def z_image():
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            **{"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2},
            **{"n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4]},
            axes_lens=[256, 32, 32],
        ),
        scheduler=euler(shift=6.0),
        vae=kl_vae(),
        text_encoder=decoder("Qwen3Model"),
        tokenizer=tokenizer(chat_template=CHAT),
    )


def aura_flow():
    return diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(
            **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 2},
            **{"num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4},
            **{"caption_projection_dim": 32, "joint_attention_dim": 32, "pos_embed_max_size": 256},
        ),
        scheduler=euler(shift=1.73),
        vae=kl_vae(shift_factor=None),
        text_encoder=t5(kind="UMT5"),
        tokenizer=tokenizer("$A </s>"),
    )


def chroma():
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            **{"in_channels": 16, "num_layers": 2, "num_single_layers": 2},
            **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32},
            **{"axes_dims_rope": [4, 4, 8], "approximator_hidden_dim": 32},
            **{"approximator_layers": 1, "approximator_num_channels": 16},
        ),
        scheduler=euler(**SHIFTED),
        vae=kl_vae(),
        text_encoder=t5(),
        tokenizer=tokenizer("$A </s>"),
    )


def cogview4():
    return diffusers.CogView4Pipeline(
        transformer=diffusers.CogView4Transformer2DModel(
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8},
            **{"attention_head_dim": 4, "num_attention_heads": 4, "text_embed_dim": 32},
            **{"time_embed_dim": 8, "condition_dim": 4},
        ),
        scheduler=euler(
            **{"use_dynamic_shifting": True, "time_shift_type": "linear"},
            **{"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 4},
        ),
        vae=kl_vae(shift_factor=None),
        text_encoder=decoder("GlmModel", 32),
        tokenizer=tokenizer("<s> $A", padding_side="left"),
    )


def hidream(scheduler=None):
    pipe = diffusers.HiDreamImagePipeline(
        transformer=diffusers.HiDreamImageTransformer2DModel(
            **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1},
            **{"num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4},
            **{"caption_channels": [32, 16], "text_emb_dim": 64, "num_routed_experts": 4},
            **{"num_activated_experts": 2, "axes_dims_rope": (4, 2, 2)},
            **{"max_resolution": (16, 16), "llama_layers": (0, 1, 1)},
        ),
        scheduler=scheduler or diffusers.UniPCMultistepScheduler(**FLOW_SIGMAS),
        vae=kl_vae(),
        **{"text_encoder": clip(length=218), "text_encoder_2": clip(length=218)},
        **{"tokenizer": clip_tokenizer(218), "tokenizer_2": clip_tokenizer(218)},
        **{"text_encoder_3": t5(), "tokenizer_3": tokenizer("$A </s>")},
        text_encoder_4=decoder("LlamaForCausalLM", attn_implementation="eager"),
        tokenizer_4=tokenizer("<s> $A"),
    )
    pipe.default_sample_size = 16
    return pipe


def bria():
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(
            **{"in_channels": 16, "num_layers": 2, "num_single_layers": 2},
            **{"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32},
            axes_dims_rope=[0, 4, 4],
        ),
        scheduler=euler(**SHIFTED),
        vae=kl_vae(blocks=3),
        text_encoder=t5(),
        tokenizer=tokenizer("$A </s>"),
    )


def kandinsky5_t2i():
    pipe = diffusers.Kandinsky5T2IPipeline(**kandinsky5_parts(), vae=kl_vae())
    pipe.resolutions = [(64, 64)]
    return pipe


def krea2(**options):
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6}
    text = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16}
    text |= {"intermediate_size": 32, "head_dim": 8, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": 16, "deepstack_visual_indexes": []}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return diffusers.Krea2Pipeline(
        transformer=diffusers.Krea2Transformer2DModel(
            **{"in_channels": 16, "num_layers": 2, "attention_head_dim": 16},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
            **{"timestep_embed_dim": 16, "text_hidden_dim": 16, "num_text_layers": 2},
            **{"text_num_attention_heads": 2, "text_num_key_value_heads": 2},
            **{"text_intermediate_size": 32, "num_layerwise_text_blocks": 1},
            **{"num_refiner_text_blocks": 1, "axes_dims_rope": (8, 4, 4)},
        ),
        scheduler=euler(**SHIFTED, max_image_seq_len=6400),
        vae=qwen_vae(),
        text_encoder=transformers.Qwen3VLModel(config),
        tokenizer=tokenizer(),
        text_encoder_select_layers=(1, 2),
        **options,
    )


def sana():
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8},
            **{"num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": 32},
            **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 8},
            **{"cross_attention_dim": 16, "patch_size": 1},
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(**FLOW_SIGMAS),
        vae=diffusers.AutoencoderDC(
            **{"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2},
            **{"encoder_block_types": ("ResBlock",) * 4, "decoder_block_types": ("ResBlock",) * 4},
            **{"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
            **{"encoder_qkv_multiscales": ((), (), (), ()), "scaling_factor": 0.41407},
            **{"decoder_qkv_multiscales": ((), (), (), ())},
            **{"encoder_layers_per_block": (1,) * 4, "decoder_layers_per_block": [1] * 4},
            **{"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
            **{"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
        ),
        text_encoder=decoder("Gemma2Model", 32),
        tokenizer=tokenizer("<s> $A", length=8192),
    )


PIPELINES = {
    "sd3": sd3,
    "flux1-dev": flux1,
    "flux1-schnell": lambda: flux1(is_dev=False),
    "flux2-dev": flux2_dev,
    "flux2-klein": flux2_klein,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "lumina2": lumina2,
    "aura-flow": aura_flow,
    "chroma": chroma,
    "cogview4": cogview4,
    "hidream": hidream,
    "hidream-euler": lambda: hidream(euler(shift=3.0)),
    "bria": bria,
    "kandinsky5-t2i": kandinsky5_t2i,
    "krea2": krea2,
    "sana": sana,
    **VIDEOS,
    **OTHERS,
}
# Of the images and videos; 64 for the others.
SIDES = {"hidream": 128, "hidream-euler": 128, "ltx": 32, "ltx-static": 32}


def tiny_size(name):
    """The options of a family for its tiny pipeline."""
    side = SIDES.get(name, 64)
    frames = {"frames": FRAMES[name]} if name in FRAMES else {}
    return {"height": side, "width": side} | frames


def tiny_pipeline(name):
    """The family's pipeline for small images; parameters moved off the zeros they start with."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    with torch.no_grad():
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
                for parameter in part.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
    return pipe
