"""What the compared objectives cost those who do not use them: the import, and a step of MFD.

python -m bench.bench_overhead --out bench/results/overhead_cpu.json

import: seconds of ``import mfd_fast`` in a fresh process after torch, and of the one module of the
compared objectives that it loads (their settings).  step: seconds of a cycle of MFD on a network so
small that the host is all there is to see, with the registry as it is and with MFD alone in it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from bench.record import header, write
from mfd_fast import CopiedBackbone, DistillConfig, Distiller
from mfd_fast.distill import registry as objectives

IMPORT = """
import sys, time
import torch
start = time.perf_counter()
import mfd_fast
print(time.perf_counter() - start)
print(*(m for m in sys.modules if m.startswith("mfd_fast.distill.registry.")))
"""
SETTINGS = """
import importlib, sys, time
import mfd_fast
del sys.modules["mfd_fast.baselines.config"]
start = time.perf_counter()
importlib.import_module("mfd_fast.baselines.config")
print(time.perf_counter() - start)
"""
REPEATS, CYCLES = 15, 60


class Tiny(torch.nn.Module):
    """v(x, t, cond) of two numbers."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 2)

    def forward(self, x, t, cond):
        return self.body(torch.cat([x, t[:, None], cond], dim=1))


def in_fresh_process(code: str) -> list[str]:
    """The lines that the code prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def make() -> Distiller:
    torch.manual_seed(0)
    backbone = CopiedBackbone(Tiny(), sample_shape=(2,), null_cond=torch.zeros_like)
    return Distiller(backbone, DistillConfig(guidance=2.0, step_size=0.1, aux_updates=2))


def cycle_seconds(distiller: Distiller, cond: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(3 * CYCLES):
        distiller.step(cond)
    return (time.perf_counter() - start) / CYCLES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    imports = [in_fresh_process(IMPORT) for _ in range(REPEATS)]
    settings = [in_fresh_process(SETTINGS) for _ in range(REPEATS)]
    alone = {name: path for name, path in objectives.OBJECTIVES.items() if name in ("mfd", "vsd")}
    with patch.object(objectives, "OBJECTIVES", alone):
        without = make()
    both, cond = {"all": make(), "mfd alone": without}, torch.randn(8, 1)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(REPEATS):  # interleaved: the machine's mood is shared
        for name, distiller in both.items():
            seconds[name].append(cycle_seconds(distiller, cond))
    rows = [
        {"what": "import mfd_fast", **spread([float(lines[0]) for lines in imports])},
        {"what": "of it their settings", **spread([float(lines[0]) for lines in settings])},
        *({"what": f"cycle, {name}", **spread(values)} for name, values in seconds.items()),
    ]
    for row in rows:
        print(row)
    config = {"repeats": REPEATS, "cycles": CYCLES, "imported": imports[0][1].split()}
    write(args.out, header("overhead", "cpu", config), rows)
    return 0


def spread(values: list[float]) -> dict[str, float]:
    """Median, p10 and p90 in milliseconds."""
    ordered = sorted(1e3 * value for value in values)
    last = len(ordered) - 1
    names = {"ms": 0.5, "ms_p10": 0.1, "ms_p90": 0.9}
    return {name: round(ordered[round(share * last)], 3) for name, share in names.items()}


if __name__ == "__main__":
    raise SystemExit(main())
