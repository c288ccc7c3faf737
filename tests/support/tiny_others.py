"""Small random pipelines that need what is not installed, parts of ``tiny_pipelines``."""

from tiny_parts import diffusers, euler, t5, tokenizer, wan_vae


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


OTHERS = {"cosmos2": cosmos2}
