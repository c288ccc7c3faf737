"""Cost (paper Table 4): processor time and peak memory of every method, same network, same batch.

Every method runs in a process of its own for a few cycles.  Full copies of the network are trained
here, LoRA adapters in the paper.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from mfd_fast.baselines.config import ObjectiveName
from mfd_fast.run.environment import peak_memory
from mfd_fast.run.maker import make_distiller
from studies.digits_runs import digits_config
from studies.plots import Figure, bars
from studies.verdict import Verdict

CLAIM = (
    "GPU hours and peak GB on SANA: Diff-Instruct 22, 20; CD 4, 15; DMD2 30, 50; MFD 25, 20: cd is "
    "cheapest, mfd close to vsd, dmd2 dearest in both"
)
RULE = (
    "cd takes least time, mfd less than 1.5 times vsd's, and dmd2 most time and most "
    "memory of the four"
)
METHODS = get_args(ObjectiveName)
BATCH = 128
CYCLES = 4
AUX_UPDATES = 10  # the paper's ratio
CLOSE = 1.5
MEBI = 1 << 20


def run(seed: int, folder: Path) -> dict[str, Any]:
    rows = []
    for method in METHODS:
        command = [sys.executable, "-m", "studies.cost", method, str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"method": method, **json.loads(done.stdout)})
    return {"batch": BATCH, "cycles": CYCLES, "aux_updates": AUX_UPDATES, "rows": rows}


def measure(method: str, seed: int) -> dict[str, float]:
    """Processor seconds of a student update with its auxiliary updates; MiB above the start."""
    torch.set_num_threads(1)
    config = digits_config(
        updates=CYCLES, batch_size=BATCH, objective=method, seed=seed, aux_updates=AUX_UPDATES
    )
    task = config.task()
    next_cond = task.conditions()
    task.teacher(torch.zeros(BATCH, 1, 8, 8), torch.ones(BATCH))  # load what any forward loads
    before = peak_memory("cpu") / MEBI
    distiller = make_distiller(task.backbone(), config.distill)
    updates, start = 0, 0.0
    while distiller.num_updates["student"] < 1 + CYCLES:
        distiller.step(next_cond(updates))
        updates += 1
        if distiller.num_updates["student"] == 1 and not start:
            start = time.process_time()
    seconds = (time.process_time() - start) / CYCLES
    return {"seconds": seconds, "mebibytes": peak_memory("cpu") / MEBI - before}


def draw(figures: dict[str, Any], path: Path) -> None:
    rows = figures["rows"]
    names = [row["method"] for row in rows]
    figure = Figure(columns=2, title=f"Cost of a student update, digits, batch {figures['batch']}")
    none = [0.0] * len(rows)
    bars(figure.axes[0], names, [r["seconds"] for r in rows], none, "processor seconds")
    bars(figure.axes[1], names, [r["mebibytes"] for r in rows], none, "peak memory, MiB")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    rows = {row["method"]: row for row in figures["rows"]}
    seconds, memory = (
        {name: rows[name][key] for name in ("cd", "vsd", "mfd", "dmd2")}
        for key in ("seconds", "mebibytes")
    )
    holds = (
        min(seconds, key=seconds.get) == "cd"
        and seconds["mfd"] < CLOSE * seconds["vsd"]
        and max(seconds, key=seconds.get) == max(memory, key=memory.get) == "dmd2"
    )
    text = "; ".join(f"{name} {seconds[name]:.2f} s, {memory[name]:.0f} MiB" for name in seconds)
    return Verdict.of(holds, f"full copies on a CPU: {text}")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
