"""A diffusers + accelerate script, plus Mean Flow Distillation.  Added lines say `# mfd`.

The stock part is the usual one: Accelerator, a diffusers pipeline, a loader of prompt embeddings.
Here the pipeline is a small random SD3 without its text encoders, so that it runs anywhere; put
yours in its place, of any family in docs/families.md: python examples/diffusers_accelerate.py, or
accelerate launch for several processes, which then share every update.
"""

import torch
from accelerate import Accelerator
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch.utils.data import DataLoader, TensorDataset

from mfd_fast.diffusers import distillation  # mfd


def small_pipeline() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=24, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    parts += ("tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, **dict.fromkeys(parts)
    )


def main(updates: int = 24) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    accelerator = Accelerator()
    pipe = small_pipeline()
    pipe.transformer.requires_grad_(False).to(accelerator.device)
    text, pooled = torch.randn(256, 10, 24), torch.randn(256, 16)
    loader = accelerator.prepare(
        DataLoader(TensorDataset(text, pooled), batch_size=4, shuffle=True)
    )

    device = accelerator.device
    first = {"text": text[:1].to(device), "pooled": pooled[:1].to(device)}  # mfd: any prompt
    null = {name: torch.randn_like(leaf) for name, leaf in first.items()}  # mfd: your empty one
    size = {"height": 64, "width": 64}  # mfd
    d = distillation(pipe, steps=2, rank=8, cond=first, null=null, **size)  # mfd
    accelerator.register_for_checkpointing(d.distiller)  # mfd: save_state and load_state have it

    update = 0
    while update < updates:
        for batch_text, batch_pooled in loader:
            metrics = d.step({"text": batch_text, "pooled": batch_pooled})  # mfd
            update += 1
            if update % 4 == 0:
                accelerator.print(update, {k: f"{v.item():.4f}" for k, v in metrics.items()})
            if update == updates:
                break
    if accelerator.is_main_process:
        d.save("student")  # mfd
    return d.backbone.adapters.adapter_state_dict("student", prefix="")


if __name__ == "__main__":
    main()
