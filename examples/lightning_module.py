"""A Lightning module, plus Mean Flow Distillation.  Added lines end in `# mfd`.

python examples/lightning_module.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfd_fast import CopiedBackbone, DistillConfig, Distiller  # mfd


class VelocityNet(nn.Module):
    """v(x, t, cond): x [B, 2], t [B] with t = 1 noise, cond [B, 4]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t, cond):
        return self.body(torch.cat([x, t[:, None], cond], dim=1))


class Distillation(lightning.LightningModule):
    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.automatic_optimization = False  # mfd
        self.backbone = CopiedBackbone(
            teacher, sample_shape=(2,), null_cond=torch.zeros_like
        )  # mfd
        self.config = DistillConfig(guidance=2.0, step_size=0.1, aux_updates=4)  # mfd

    def configure_optimizers(self):
        return [  # mfd
            torch.optim.AdamW(self.backbone.parameters_of("aux"), lr=3e-4),  # mfd
            torch.optim.AdamW(self.backbone.parameters_of("student"), lr=1e-4),  # mfd
        ]  # mfd

    def on_fit_start(self):
        aux, student = self.optimizers(use_pl_optimizer=False)  # mfd
        optimizers = {"aux": aux, "student": student}  # mfd
        self.distiller = Distiller(self.backbone, self.config, optimizers)  # mfd

    def training_step(self, batch, index):
        (cond,) = batch
        metrics = self.distiller.step(cond)  # mfd
        self.log_dict(metrics, prog_bar=True)


def main(updates: int = 50) -> nn.Module:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(4096, 4)), batch_size=64)
    module = Distillation(VelocityNet())
    trainer = lightning.Trainer(
        max_steps=-1, limit_train_batches=updates, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.backbone.student


if __name__ == "__main__":
    main()
