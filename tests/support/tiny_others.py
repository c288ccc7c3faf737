"""Small random pipelines that need what is not installed, parts of ``tiny_pipelines``."""

from tiny_parts import diffusers, euler, kl_vae, t5, tokenizer, wan_vae

from mfd_fast.models.diffusers.omnigen import OmniGen


class Checker:
    """In place of cosmos_guardrail, which is no dependency: refuses one word, darkens nothing."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return "unsafe" not in prompt

    def check_video_safety(self, frames):
        return frames


def cosmos2(scheduler=None):
    from diffusers.pipelines.cosmos import pipeline_cosmos2_text2image as module

    module.CosmosSafetyChecker = Checker  # also of a pipeline that is read from its folder
    return diffusers.Cosmos2TextToImagePipeline(
        transformer=diffusers.CosmosTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
            **{"mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4},
            **{"max_size": (4, 32, 32), "rope_scale": (1.0, 4.0, 4.0)},
            extra_pos_embed_type=None,
        ),
        scheduler=scheduler or euler(use_karras_sigmas=True),
        vae=wan_vae(),
        text_encoder=t5(),
        tokenizer=tokenizer("$A </s>"),
        safety_checker=Checker(),
    )


def omnigen():
    OmniGen.before()  # as a pipeline that is made by hand needs it without torchvision
    return diffusers.OmniGenPipeline(
        transformer=diffusers.OmniGenTransformer2DModel(
            **{"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4},
            **{"intermediate_size": 32, "num_layers": 2, "in_channels": 4, "time_step_dim": 4},
            **{"vocab_size": 300, "pad_token_id": 0},
            rope_scaling={"short_factor": [1, 2], "long_factor": [1, 2]},
        ),
        scheduler=euler(invert_sigmas=True, num_train_timesteps=1),
        vae=kl_vae(shift_factor=None),
        tokenizer=tokenizer("<s> $A", length=4096),
    )


OTHERS = {"cosmos2": cosmos2, "omnigen": omnigen}
