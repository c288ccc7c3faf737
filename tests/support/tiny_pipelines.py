"""A small random pipeline of every family: nothing is downloaded, each takes a moment to build."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
VOCABULARY = len(SPECIAL) + 256
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
SHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def tokenizer(template="$A", length=512, **options):
    """Bytes as tokens, without merges; ``template`` puts special ones around them."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing

    names = SPECIAL + sorted(ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = [(name, vocabulary[name]) for name in SPECIAL if name in template]
    made.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=length,
        **{"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"},
        additional_special_tokens=SPECIAL[4:],
        **options,
    )


def clip_tokenizer(length=77):
    return tokenizer("<s> $A </s>", length)


def clip(kind="CLIPTextModelWithProjection", size=32, length=77):
    config = transformers.CLIPTextConfig(
        **SIZES,
        **{"hidden_size": size, "intermediate_size": 37, "projection_dim": size},
        **{
            "max_position_embeddings": length,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
    )
    return getattr(transformers, kind)(config)


def t5(size=32, kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        **{
            "d_model": size,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
        }
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def decoder(kind, size=16, **options):
    """A small language model of the class ``kind``."""
    model = getattr(transformers, kind)
    return model(
        model.config_class(
            **SIZES | {"num_attention_heads": 2},
            **{
                "hidden_size": size,
                "intermediate_size": 32,
                "num_key_value_heads": 1,
                "head_dim": 8,
            },
            **{
                "max_position_embeddings": 4096,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "bos_token_id": 2,
            },
            **options,
        )
    )


def kl_vae(blocks=4, **options):
    return diffusers.AutoencoderKL(
        **{"block_out_channels": (4,) * blocks, "layers_per_block": 1, "latent_channels": 4},
        **{"norm_num_groups": 1, "use_quant_conv": False, "use_post_quant_conv": False},
        **{"down_block_types": ("DownEncoderBlock2D",) * blocks},
        **{"up_block_types": ("UpDecoderBlock2D",) * blocks},
        **{"shift_factor": 0.0609, "scaling_factor": 1.5035} | options,
    )


def qwen_vae():
    return diffusers.AutoencoderKLQwenImage(
        **{"base_dim": 12, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        **{"temperal_downsample": [False, True, True]},
        **{"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 1.1, 0.9, 1.2]},
    )


def euler(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


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
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = dict(
        **{
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        **{
            "num_key_value_heads": 2,
            "rope_scaling": rope,
            "rope_theta": 1e6,
            "vocab_size": VOCABULARY,
        },
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    )
    vision = dict(
        **{
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        }
    )
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
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
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
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


PIPELINES = {
    "sd3": sd3,
    "flux1-dev": flux1,
    "flux1-schnell": lambda: flux1(is_dev=False),
    "qwen-image": qwen_image,
    "lumina2": lumina2,
}


def tiny_pipeline(name):
    """The family's pipeline for 64 x 64 images; parameters moved off the zeros they start with."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    with torch.no_grad():
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
                for parameter in part.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
    return pipe
