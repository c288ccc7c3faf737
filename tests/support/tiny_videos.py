"""Small random pipelines of videos, parts of ``tiny_pipelines``."""

from tiny_parts import (
    FLOW_SIGMAS,
    SHIFTED,
    VOCABULARY,
    clip,
    clip_tokenizer,
    decoder,
    diffusers,
    euler,
    hunyuan_vae,
    ltx_vae,
    mochi_vae,
    qwen_vl,
    t5,
    tokenizer,
    wan_vae,
)


def wan_network(channels=16):
    return diffusers.WanTransformer3DModel(
        **{"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12},
        **{"in_channels": channels, "out_channels": channels, "text_dim": 32, "freq_dim": 256},
        **{"ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
    )


def wan(**options):
    return diffusers.WanPipeline(
        transformer=wan_network(),
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW_SIGMAS),
        vae=wan_vae(),
        text_encoder=t5(kind="UMT5"),
        tokenizer=tokenizer("$A </s>"),
        **options,
    )


def hunyuan_video():
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2},
            **{"attention_head_dim": 10, "num_layers": 2, "num_single_layers": 2},
            **{"num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 16},
            **{"pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
        ),
        scheduler=euler(shift=7.0),
        vae=hunyuan_vae(),
        text_encoder=decoder("LlamaModel"),
        tokenizer=tokenizer("<s> $A"),
        text_encoder_2=clip("CLIPTextModel", size=8),
        tokenizer_2=clip_tokenizer(),
    )
    return pipe


def ltx(scheduler=None, **vae):
    return diffusers.LTXPipeline(
        transformer=diffusers.LTXVideoTransformer3DModel(
            **{"in_channels": 8, "out_channels": 8, "num_attention_heads": 4},
            **{"attention_head_dim": 8, "cross_attention_dim": 32, "num_layers": 2},
            caption_channels=32,
        ),
        scheduler=scheduler
        or euler(
            **SHIFTED | {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024},
            shift_terminal=0.1,
        ),
        vae=ltx_vae(**vae),
        text_encoder=t5(),
        tokenizer=tokenizer("$A </s>"),
    )


def sana_video():
    return diffusers.SanaVideoPipeline(
        transformer=diffusers.SanaVideoTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2},
            **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 12},
            **{"cross_attention_dim": 24, "caption_channels": 32, "sample_size": 8},
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(**FLOW_SIGMAS),
        vae=wan_vae(),
        text_encoder=decoder("Gemma2Model", 32),
        tokenizer=tokenizer("<s> $A", length=8192),
    )


def mochi():
    return diffusers.MochiPipeline(
        transformer=diffusers.MochiTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
            **{"pooled_projection_dim": 16, "in_channels": 12, "text_embed_dim": 32},
            time_embed_dim=4,
        ),
        scheduler=euler(invert_sigmas=True),
        vae=mochi_vae(),
        text_encoder=t5(),
        tokenizer=tokenizer("$A </s>"),
        force_zeros_for_empty_prompt=True,
    )


def kandinsky5_parts(**network):
    """Its processor of text and images is too much to build: a tokenizer, to which lines of the
    template for videos are a token each, as many bytes do not fit.
    """
    words = tokenizer()
    words.add_tokens(LINES)
    return {
        "transformer": diffusers.Kandinsky5Transformer3DModel(
            **{"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16},
            **{"time_dim": 16, "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1},
            **{"num_visual_blocks": 2, "axes_dims": (4, 2, 2)},
            **network,
        ),
        "scheduler": euler(shift=5.0),
        **{"text_encoder": qwen_vl(VOCABULARY + len(LINES)), "tokenizer": words},
        **{"text_encoder_2": clip("CLIPTextModel", size=16), "tokenizer_2": clip_tokenizer()},
    }


def kandinsky5_t2v():
    parts = kandinsky5_parts(visual_cond=True)
    return diffusers.Kandinsky5T2VPipeline(**parts, vae=hunyuan_vae())


LINES = [
    "Describe how the camera moves or shakes, describe the zoom and view angle, ",
    "Describe the location of the video, main characters or objects and their action.",
    "Name the visual style of the video: whether it is a professional footage, ",
    "Describe the visual effects, postprocessing and transitions if they are presented in the ",
]
VIDEOS = {
    "wan": wan,
    "wan2.2-5b": lambda: wan(expand_timesteps=True),
    "wan2.2-a14b": lambda: wan(transformer_2=wan_network(), boundary_ratio=0.875),
    "hunyuan-video": hunyuan_video,
    "ltx": ltx,
    "ltx-static": lambda: ltx(euler(shift=1.0), timestep_conditioning=True),
    "sana-video": sana_video,
    "kandinsky5-t2v": kandinsky5_t2v,
    "mochi": mochi,
}
FRAMES = {
    **dict.fromkeys(("wan", "wan2.2-5b", "wan2.2-a14b", "hunyuan-video", "sana-video"), 5),
    **{"ltx": 9, "ltx-static": 9, "mochi": 7, "kandinsky5-t2v": 5},
}
