"""A training loop in several processes, plus Mean Flow Distillation.  Added lines say `# mfd`.

torchrun --nproc-per-node 2 examples/several_processes.py

One process, python examples/several_processes.py, learns from the same samples and ends with the
same student, up to the order in which gradients are added.
"""

import os

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mfd_fast import CopiedBackbone, DistillConfig, Distiller  # mfd

BATCH = 64  # of all processes together


class VelocityNet(nn.Module):
    """v(x, t, cond): x [B, 2], t [B] with t = 1 noise, cond [B, 4]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t, cond):
        return self.body(torch.cat([x, t[:, None], cond], dim=1))


def main(updates: int = 200) -> nn.Module:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    teacher = VelocityNet()  # your pretrained network: not wrapped in DistributedDataParallel
    conditions = TensorDataset(torch.randn(4096, 4))
    sampler = DistributedSampler(conditions, num_replicas=world, rank=rank)
    loader = DataLoader(conditions, batch_size=BATCH // world, sampler=sampler)

    backbone = CopiedBackbone(teacher, sample_shape=(2,), null_cond=torch.zeros_like)  # mfd
    config = DistillConfig(guidance=2.0, step_size=0.1, aux_updates=4, ema_decay=0.99)  # mfd
    distiller = Distiller(backbone, config)  # mfd: finds the processes, sums the gradients itself

    update, epoch = 0, 0
    while update < updates:
        sampler.set_epoch(epoch)
        for (cond,) in loader:
            distiller.step(cond)  # mfd: every process takes part, with equally many rows
            update += 1
            if update == updates:
                break
        epoch += 1

    student = distiller.student_network()  # mfd: the same in every process
    if rank == 0:
        save_model(student, "student.safetensors")
    if world > 1:
        dist.destroy_process_group()
    return student


if __name__ == "__main__":
    main()
