"""A Lightning module, plus Mean Flow Distillation.  Added lines say `# mfd`.

python examples/lightning_module.py

Lightning counts every update of either role as a step, so max_steps, checkpoints every n steps and
loggers work; checkpoints hold the whole distillation; strategy="ddp" shares every update.
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
        null = torch.zeros_like  # mfd
        self.backbone = CopiedBackbone(teacher, sample_shape=(2,), null_cond=null)  # mfd
        settings = {"guidance": 2.0, "step_size": 0.1, "aux_updates": 4, "ema_decay": 0.99}  # mfd
        self.config = DistillConfig(**settings)  # mfd
        self.restored = None  # mfd

    def configure_optimizers(self):
        return [  # mfd
            torch.optim.AdamW(self.backbone.parameters_of("aux"), lr=3e-4),  # mfd
            torch.optim.AdamW(self.backbone.parameters_of("student"), lr=1e-4),  # mfd
        ]  # mfd

    def on_fit_start(self):  # mfd
        aux, student = self.optimizers()  # mfd: Lightning's wrappers, which count steps
        own = {"aux": aux, "student": student}  # mfd
        self.distiller = Distiller(self.backbone, self.config, own)  # mfd
        if self.restored is not None:  # mfd
            self.distiller.load_state_dict(self.restored)  # mfd

    def on_save_checkpoint(self, checkpoint):  # mfd
        checkpoint["distiller"] = self.distiller.state_dict()  # mfd

    def on_load_checkpoint(self, checkpoint):  # mfd
        self.restored = checkpoint["distiller"]  # mfd

    def training_step(self, batch, index):
        (cond,) = batch
        metrics = self.distiller.step(cond)  # mfd
        self.log_dict(metrics, prog_bar=True)


def main(updates: int = 50, batch: int = 64, ckpt_path: str | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(4096, 4)), batch_size=batch)
    module = Distillation(VelocityNet())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=updates, **(quiet | options))
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module.distiller.student_network()  # mfd: a copy with the EMA weights


if __name__ == "__main__":
    main()
