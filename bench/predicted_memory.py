"""The memory a cycle is predicted to need, beside what it needed: growth of the process's RSS.

    python -m bench.predicted_memory --out bench/results/predicted_memory_cpu.json

Every case runs in a process of its own, after a small run that loads what is loaded once; its
allocator returns what is freed (``MALLOC_MMAP_THRESHOLD_``), so that the highest RSS is the highest
sum of what was alive.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench import sana_mini
from bench.record import header, write
from mfd_fast.adapters import AdapterBank
from mfd_fast.backbone import CopiedBackbone
from mfd_fast.config import DistillConfig, RunConfig
from mfd_fast.cost import MetaModel, trace_cycle
from mfd_fast.cost.estimate import memory_of
from mfd_fast.distiller import Distiller
from mfd_fast.models.occfm import CONFIGS
from mfd_fast.models.occfm.network import OccfmNetwork, null_condition
from mfd_fast.models.sana import BLOCKS, SanaConfig, SanaNetwork
from mfd_fast.presets import preset
from mfd_fast.shared_backbone import SharedBackbone
from mfd_fast.tasks.digits import DigitsTask

UPDATES = 4  # two cycles of one auxiliary and one student update
SMALL_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def digits(device: str) -> MetaModel:
    """The packaged DiT, three full copies."""
    task = DigitsTask(preset("digits"))
    task.teacher.to(device)
    return MetaModel(task.backbone(), partial(torch.zeros, dtype=torch.int64, device=device))


def small_sana(device: str, activation: str = "none") -> MetaModel:
    """A SANA of 8 blocks of width 512 in float32, adapters of rank 64."""
    with torch.device(device):
        network = SanaNetwork(SanaConfig(**sana_mini.CONFIG), time_table=True)
    backbone = SharedBackbone(
        network,
        adapters=AdapterBank(network),
        sample_shape=(32, 16, 16),
        null_cond=lambda cond: cond,
        activation=activation,
        blocks=BLOCKS,
    )
    return MetaModel(
        backbone, lambda batch: {"text": torch.zeros(batch, sana_mini.TEXT, 512, device=device)}
    )


def occfm_tiny(device: str) -> MetaModel:
    """The tiny OccFM, three full copies."""
    config = CONFIGS["tiny"]
    with torch.device(device):
        network = OccfmNetwork(config)
    backbone = CopiedBackbone(network, sample_shape=config.sample_shape, null_cond=null_condition)
    history = (config.history, *config.latent_shape)

    def cond(batch: int) -> dict[str, torch.Tensor]:
        return {
            "history": torch.zeros(batch, *history, device=device),
            "trajectory": torch.zeros(batch, config.frames, 2, device=device),
        }

    return MetaModel(backbone, cond)


# name -> model and batch
CASES: dict[str, tuple[Callable[[str], MetaModel], int]] = {
    "digits": (digits, 512),
    "sana-mini": (small_sana, 4),
    "sana-mini, block": (partial(small_sana, activation="block"), 4),
    "occfm-tiny": (occfm_tiny, 8),
}


def settings() -> DistillConfig:
    """One auxiliary and one student update, two-step student, four-step intervals."""
    return DistillConfig(aux_updates=1, student_steps=2, step_size=0.25, ema_decay=0.99)


def predicted(make: Callable[[str], MetaModel], batch: int) -> dict[str, float]:
    """Bytes by component."""
    cycle = trace_cycle(make("meta"), settings(), batch)
    return memory_of(cycle, RunConfig(preset=""), has_context=False)


def measured(make: Callable[[str], MetaModel], batch: int) -> int:
    """Bytes that the RSS of this process grows by, at its highest, while two cycles run."""
    run(make, 1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest RSS is counted from now on
    before = _status("VmRSS")
    run(make, batch)
    return _status("VmHWM") - before


def run(make: Callable[[str], MetaModel], batch: int) -> None:
    """A few updates on the CPU."""
    model = make("cpu")
    distiller = Distiller(model.backbone, settings())
    for _ in range(UPDATES):
        distiller.step(model.cond(batch))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measured_elsewhere(name: str, batch: int) -> int:
    """:func:`measured` in a process of its own."""
    code = f"from bench.predicted_memory import *; print(measured(CASES[{name!r}][0], {batch}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | SMALL_HEAP,
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


def row(name: str, batch: int) -> dict:
    """Both numbers of one case, in megabytes."""
    parts = predicted(CASES[name][0], batch)
    total, growth = sum(parts.values()), measured_elsewhere(name, batch)
    return {
        "case": name,
        "batch": batch,
        "predicted_mb": round(total / 1e6, 1),
        "measured_mb": round(growth / 1e6, 1),
        "ratio": round(total / growth, 3),
        "parts_mb": {part: round(size / 1e6, 2) for part, size in parts.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = {key: str(value) for key, value in vars(settings()).items()}
    rows = []
    for name, (_, batch) in CASES.items():
        rows.append(row(name, batch))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        write(args.out, header("predicted_memory", "cpu", config), rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
