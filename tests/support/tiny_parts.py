"""Parts of small random pipelines: tokenizers of bytes, text encoders, VAEs."""

import pytest

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
VOCABULARY = len(SPECIAL) + 256
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}

FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def euler(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


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


def qwen_vl(vocabulary=VOCABULARY):
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = dict(
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "rope_scaling": rope},
        **{"rope_theta": 1e6, "vocab_size": vocabulary},
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    )
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def decoder(kind, size=16, **options):
    """A small language model of the class ``kind``."""
    model = getattr(transformers, kind)
    return model(
        model.config_class(
            **SIZES | {"num_attention_heads": 2} | options,
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


def flux2_vae():
    return diffusers.AutoencoderKLFlux2(
        **{"block_out_channels": (4,) * 4, "layers_per_block": 1, "latent_channels": 1},
        **{"down_block_types": ("DownEncoderBlock2D",) * 4, "norm_num_groups": 1},
        **{"up_block_types": ("UpDecoderBlock2D",) * 4, "use_quant_conv": False},
        use_post_quant_conv=False,
    )


def hunyuan_vae():
    return diffusers.AutoencoderKLHunyuanVideo(
        **{"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1},
        norm_num_groups=4,
    )


def ltx_vae(**options):
    scaling = (True, True, False, False)
    return diffusers.AutoencoderKLLTXVideo(
        **{"latent_channels": 8, "block_out_channels": (8,) * 4, "patch_size": 1},
        **{"decoder_block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5},
        **{"decoder_layers_per_block": (1,) * 5, "spatio_temporal_scaling": scaling},
        **{"decoder_spatio_temporal_scaling": scaling},
        **options,
    )


def mochi_vae():
    return diffusers.AutoencoderKLMochi(
        **{"latent_channels": 12, "out_channels": 3, "layers_per_block": (1,) * 5},
        **{"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
    )


def wan_vae():
    return diffusers.AutoencoderKLWan(
        **{"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        temperal_downsample=[False, True, True],
    )
