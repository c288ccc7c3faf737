"""A training loop of your own, plus Mean Flow Distillation.  Added lines say `# mfd`.

The stock script loads a pretrained flow-matching network and loops over a data set; here both are
small and made on the spot, so that it runs anywhere: python examples/plain_pytorch.py
"""

import torch
from safetensors.torch import save_model
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


def main(updates: int = 200) -> nn.Module:
    torch.manual_seed(0)
    teacher = VelocityNet()  # your pretrained network
    loader = DataLoader(TensorDataset(torch.randn(4096, 4)), batch_size=64, shuffle=True)

    backbone = CopiedBackbone(teacher, sample_shape=(2,), null_cond=torch.zeros_like)  # mfd
    config = DistillConfig(guidance=2.0, step_size=0.1, aux_updates=4, ema_decay=0.99)  # mfd
    distiller = Distiller(backbone, config)  # mfd

    update = 0
    while update < updates:
        for (cond,) in loader:
            metrics = distiller.step(cond)  # mfd: of the auxiliary 4 times, then of the student
            update += 1
            if update % 50 == 0:
                print(update, {name: f"{value.item():.4f}" for name, value in metrics.items()})
            if update == updates:
                break

    samples = distiller.generate(torch.randn(8, 2), torch.randn(8, 4))  # mfd
    print("eight one-step samples:", samples)
    student = distiller.student_network()  # mfd: a copy with the EMA weights
    save_model(student, "student.safetensors")
    return student


if __name__ == "__main__":
    main()
