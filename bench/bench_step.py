"""Whole updates, one switch at a time, from the literal loop to the whole engine: a waterfall.

    python -m bench.bench_step --model sana-mini --out bench/results/step_sana_mini_cpu.json

    literal      diffusers + PEFT, one network call after another (``bench.baseline_eager``)
    sequential   our engine on diffusers' network with its adapters, one lane a call
    lane-packed  all lanes of an ODE step in one call
    prepared     our network: text prepared once and without padding, operators from PyTorch
    fused        the same with the compiled operators
    captured     the same as CUDA graphs; only on a GPU
    block        blocks recomputed in the backward
    batch N      N samples an update
    ab2          a second-order solver with twice the step

Every variant has the same weights and interval and runs in a process of its own: one update of each
role that is not counted, then the counted ones.  Seconds of the processor stand beside those of the
clock; on a CPU that others use too, only the former compare.  Digits have no diffusers network
and no operators of their own: their waterfall is ``sequential``, ``lane-packed``, ``captured``,
batches and ``ab2``.  Operations charge
adapters on every row of a call.  Without diffusers and peft the first three are skipped by name.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor

from bench import sana_mini
from bench.record import header, write
from mfd_fast.backbone import Backbone, Lane, Prepared
from mfd_fast.captured import CapturedDistiller
from mfd_fast.config import DistillConfig
from mfd_fast.cost.trace import Trace
from mfd_fast.distiller import Distiller
from mfd_fast.objectives.mfd import MeanFlowDistillation
from mfd_fast.solvers import SolverTable, plan

INTERVAL = (0.6, 0.5)  # five steps of .02
STEP = 0.02
ROOT = Path(__file__).resolve().parents[1]
SANA_MODELS = {"sana-mini": "mini", "sana-1.6b": "1.6b"}
MODELS = ("digits", *SANA_MODELS)
VARIANTS = {
    "literal": {},
    "sequential": {},
    "lane-packed": {},
    "prepared": {},
    "fused": {},
    "captured": {},
    "block": {},
    "batch 2": {"batch": 2},
    "batch 4": {"batch": 4},
    "batch 8": {"batch": 8},
    "ab2": {"solver": "ab2", "step": 2 * STEP},
}
GENERIC = ("sequential", "lane-packed")  # of a SANA: on diffusers' own network

Updates = dict[str, Callable[[], Any]]


class FixedInterval(MeanFlowDistillation):
    """Mean Flow Distillation over one interval, so that all variants do the same work."""

    def draw(self, batch: int, generator: Generator) -> SolverTable:
        t, r = (torch.full((batch,), end) for end in INTERVAL)
        return plan(t, r, step_size=self.config.step_size, solver=self.config.solver)


class Sequential:
    """A backbone that evaluates one lane a call, whatever it is asked for."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, lanes: tuple[Lane, ...]) -> Tensor:
        times = t if t.ndim == 2 else t[:, None].expand(len(t), len(lanes))
        parts = [
            self.backbone.forward(x[:, i : i + 1], times[:, i : i + 1], prepared, (lane,))
            for i, lane in enumerate(lanes)
        ]
        return torch.cat(parts, dim=1)


def settings(model: str, solver: str = "euler", step: float = STEP) -> DistillConfig:
    """Guided, with the student's own number of steps."""
    return DistillConfig(
        step_size=step, solver=solver, student_steps=1 if model == "digits" else 4, min_interval=0.0
    )


def make_updates(model: str, variant: str, device: str) -> Updates:
    """{"aux", "student"} -> one update of a variant."""
    if variant == "literal":
        return _literal(model, device)
    options = VARIANTS[variant]
    config = settings(model, options.get("solver", "euler"), options.get("step", STEP))
    batch = options.get("batch", 1)
    make = _digits if model == "digits" else _sana
    backbone, cond = make(model, variant, device, batch)
    if variant == "sequential":
        backbone = Sequential(backbone)
    kind = CapturedDistiller if variant == "captured" else Distiller
    distiller = kind(backbone, config)
    distiller.objective = FixedInterval(config)
    return {
        "aux": lambda: distiller.aux_step(cond),
        "student": lambda: distiller.student_step(cond),
    }


def _literal(model: str, device: str) -> Updates:
    from bench.baseline_eager import GRID, make_loop
    from bench.sana_sizes import SIZES

    size, dtype = SIZES[SANA_MODELS[model]], _dtype(device)
    loop, prompt, null = make_loop(size, device=device, dtype=dtype)
    noise = torch.randn(1, *size.sample_shape, device=device).to(dtype)
    interval = tuple(round(end * GRID) for end in INTERVAL)
    return {
        "aux": lambda: loop.aux_update(noise, prompt, GRID // 2),
        "student": lambda: loop.student_update(noise, prompt, null, interval),
    }


def _digits(model: str, variant: str, device: str, batch: int) -> tuple[Backbone, Tensor]:
    from mfd_fast.presets import preset
    from mfd_fast.tasks.digits import DigitsTask

    config = preset("digits")
    config = replace(config, train=replace(config.train, device=device, batch_size=64 * batch))
    task = DigitsTask(config)
    return task.backbone(), task.conditions()(0)


def _sana(model: str, variant: str, device: str, batch: int) -> tuple[Backbone, dict[str, Tensor]]:
    from mfd_fast.adapters import AdapterBank
    from mfd_fast.models.sana import BLOCKS
    from mfd_fast.shared_backbone import SharedBackbone

    make = _diffusers_network if variant in GENERIC else _our_network
    network, cond, side = make(model, device, batch)
    backbone = SharedBackbone(
        network,
        adapters=AdapterBank(network),
        sample_shape=(32, side, side),
        null_cond=lambda cond: cond,
        activation="block" if variant == "block" else "none",
        blocks=BLOCKS,
    )
    return backbone, cond


def _our_network(model: str, device: str, batch: int) -> tuple[torch.nn.Module, dict, int]:
    """Text without its padding."""
    from mfd_fast.models.sana import SanaConfig, SanaNetwork

    config = SanaConfig(**(sana_mini.CONFIG if model == "sana-mini" else {}))
    with torch.device(device):
        network = SanaNetwork(config, time_table=True).to(_dtype(device))
        text = torch.randn(batch, sana_mini.TEXT, config.caption_channels, dtype=_dtype(device))
        mask = torch.ones(batch, sana_mini.TEXT, dtype=torch.bool)
    return network, {"text": text, "mask": mask}, config.sample_size


def _diffusers_network(model: str, device: str, batch: int) -> tuple[torch.nn.Module, dict, int]:
    """Text padded to its full length."""
    from bench.sana_sizes import SIZES, make_prompts, make_transformer

    size, dtype = SIZES[SANA_MODELS[model]], _dtype(device)
    (text, mask), _ = make_prompts(size, device=device, dtype=dtype)
    network = Diffusers(make_transformer(size, device=device, dtype=dtype))
    cond = {"text": text.repeat(batch, 1, 1), "mask": mask.repeat(batch, 1)}
    return network, cond, size.side


class Diffusers(torch.nn.Module):
    """diffusers' transformer as ``network(x, t, cond)``."""

    def __init__(self, transformer: torch.nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.transformer(
            x,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=1000 * t,
            return_dict=False,
        )[0]


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def measure(model: str, variant: str, device: str, repeats: int) -> list[dict]:
    """A row for each role: seconds an update and sample, operators, memory."""
    torch.manual_seed(0)
    updates = make_updates(model, variant, device)
    batch = VARIANTS[variant].get("batch", 1) * (64 if model == "digits" else 1)
    rows = []
    for role, update in updates.items():
        update()
        with Trace(counts_work=True) as trace:
            update()
        seconds, cpu = _seconds(update, repeats, device)
        work = trace.work[""]
        rows.append(
            {
                "variant": variant,
                "update": role,
                "batch": batch,
                "seconds": round(seconds, 4),
                "cpu_seconds": round(cpu, 4),
                "seconds_per_sample": round((cpu if device == "cpu" else seconds) / batch, 5),
                "operators": int(work.num_ops),
                "gflop": round(work.flops / 1e9, 3),
                "peak_mb": round(_peak_bytes(device) / 1e6, 1),
                "repeats": repeats,
            }
        )
    return rows


def _seconds(update: Callable[[], Any], repeats: int, device: str) -> tuple[float, float]:
    """Medians of the clock's and the processor's seconds."""
    clock, processor = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        update()
        if device != "cpu":
            torch.cuda.synchronize()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return median(clock), median(processor)


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def variants_of(model: str, device: str) -> list[str]:
    """The variants that a model, a device and this install have, in the order of the waterfall."""
    left_out = {"literal", "prepared", "fused", "block"} if model == "digits" else set()
    if device == "cpu":
        left_out |= {"captured", "batch 8"}
    missing = [name for name in ("diffusers", "peft") if find_spec(name) is None]
    if missing and model != "digits":
        print(f"skipped: literal, {', '.join(GENERIC)} ({' and '.join(missing)} not installed)")
        left_out |= {"literal", *GENERIC}
    return [name for name in VARIANTS if name not in left_out]


def measure_elsewhere(model: str, variant: str, device: str, repeats: int) -> list[dict]:
    """:func:`measure` in a process of its own; ``prepared`` without compiled operators."""
    command = [sys.executable, "-m", "bench.bench_step", "--model", model, "--device", device]
    command += ["--variant", variant, "--repeats", str(repeats)]
    backend = {"MFD_FAST_BACKEND": "reference"} if variant == "prepared" else {}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | backend, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sana-mini")
    parser.add_argument("--variant", choices=VARIANTS, help="this one only, in this process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    if args.variant:
        for row in measure(args.model, args.variant, args.device, args.repeats):
            print(json.dumps(row), flush=True)
        return 0
    config = {"model": args.model, "interval": INTERVAL, "step": STEP, "repeats": args.repeats}
    head = header("step", args.device, config)
    rows: list[dict] = []
    for variant in variants_of(args.model, args.device):
        rows += measure_elsewhere(args.model, variant, args.device, args.repeats)
        print(*rows[-2:], sep="\n", flush=True)
        if args.out:
            write(args.out, head, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
