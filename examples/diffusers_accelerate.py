"""A diffusers + accelerate script, plus Mean Flow Distillation.  Added lines say `# mfd`.

The stock part is the usual one: Accelerator, a diffusers transformer, a loader of prompt
embeddings. Here the transformer is a small random SANA, so that it runs anywhere; put your
checkpoint in its place: python examples/diffusers_accelerate.py, or accelerate launch for several
processes, which then share every update.
"""

import torch
from accelerate import Accelerator
from diffusers import SanaTransformer2DModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfd_fast import AdapterBank, DistillConfig, Distiller, OptimConfig, SharedBackbone  # mfd


class SanaVelocity(nn.Module):  # mfd
    """diffusers' calling convention as network(x, t, cond)."""  # mfd

    def __init__(self, transformer):  # mfd
        super().__init__()  # mfd
        self.transformer = transformer  # mfd

    def forward(self, x, t, cond):  # mfd
        out = self.transformer(  # mfd
            x,
            cond["text"],
            1000 * t,
            encoder_attention_mask=cond["mask"],
            return_dict=False,  # mfd
        )  # mfd
        return out[0]  # mfd


def small_transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=24, sample_size=8, patch_size=1,
    )  # fmt: skip


def main(updates: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    accelerator = Accelerator()
    transformer = small_transformer().to(accelerator.device)
    text, mask = torch.randn(256, 10, 24), torch.ones(256, 10)
    loader = accelerator.prepare(DataLoader(TensorDataset(text, mask), batch_size=4, shuffle=True))

    network = SanaVelocity(transformer)  # mfd
    null = {"text": torch.randn(1, 10, 24).to(accelerator.device)}  # mfd: your empty prompt
    backbone = SharedBackbone(  # mfd
        network,  # mfd
        adapters=AdapterBank(network, rank=8, alpha=8),  # mfd
        sample_shape=(4, 8, 8),  # mfd
        null_cond=lambda c: {"text": null["text"].expand_as(c["text"]), "mask": c["mask"]},  # mfd
    )  # mfd
    config = DistillConfig(student_steps=2, step_size=0.2, aux_updates=3, aux_optim=OptimConfig())
    distiller = Distiller(backbone, config)  # mfd: finds accelerate's processes
    accelerator.register_for_checkpointing(distiller)  # mfd: save_state and load_state have it

    update = 0
    while update < updates:
        for batch_text, batch_mask in loader:
            metrics = distiller.step({"text": batch_text, "mask": batch_mask})  # mfd
            update += 1
            if update % 4 == 0:
                accelerator.print(update, {k: f"{v.item():.4f}" for k, v in metrics.items()})
            if update == updates:
                break
    with distiller.averaged_student():  # mfd
        lora = backbone.adapters.adapter_state_dict("student", prefix="transformer.")  # mfd
    if accelerator.is_main_process:
        save_file(lora, "pytorch_lora_weights.safetensors")
    return lora


if __name__ == "__main__":
    main()
