"""One student and one auxiliary update of SANA: the literal diffusers + PEFT loop against ours.

Both do the same work (``test_sana_official_gradients.py``): published settings, one sample,
a fixed interval (t, r) so that both take the same number of solver steps, the same random weights,
in one process with the same threads, taking turns.  Differences that are ours: text is prepared
once and without its padding, the three lanes of an ODE step are one call; on a GPU the phases are
CUDA graphs.

    python -m bench.bench_sana --out bench/results/sana_literal_cpu.json
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from bench.baseline_eager import GRID, LiteralLoop, OfficialSettings, Prompt, make_loop
from bench.record import header, write
from bench.sana_sizes import SIZES
from mfd_fast import (
    CapturedDistiller,
    DistillConfig,
    Distiller,
    SharedBackbone,
    dpm_flow_schedule,
)
from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.distill.config import OptimConfig
from mfd_fast.distill.mfd import MeanFlowDistillation
from mfd_fast.flow.solvers import SolverTable, plan
from mfd_fast.models.sana import SanaConfig, SanaNetwork
from mfd_fast.models.sana.text.trim import trim_text

INTERVAL = (670, 330)  # 17 steps of .02, the mean of uniform pairs
AUX_TIME = 500
# Calls that are not counted; on a GPU ours captures its graphs in them.
WARMUP_CALLS = {"cpu": 1, "cuda": 6}

Update = Callable[[], object]


class FixedInterval(MeanFlowDistillation):
    """Mean Flow Distillation over one interval (t, r), in timesteps of 1/1000."""

    interval: tuple[int, int]

    def draw(self, batch: int, generator: torch.Generator) -> SolverTable:
        t, r = (torch.full((batch,), end / GRID) for end in self.interval)
        return plan(t, r, step_size=self.config.step_size, grid=self.config.grid)


def official_config(settings: OfficialSettings) -> DistillConfig:
    """The settings of the literal loop as ours."""
    optim = OptimConfig(
        lr=settings.lr, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm
    )
    return DistillConfig(
        guidance=settings.guidance,
        step_size=settings.step / GRID,
        grid=GRID,
        time_distribution="uniform",
        aux_time_distribution="uniform",
        student_steps=settings.student_steps,
        student_solver="dpmpp_2m",
        student_optim=optim,
        aux_optim=optim,
    )


def make_ours(
    loop: LiteralLoop, null: Prompt, sample_shape: tuple[int, ...], interval: tuple[int, int]
) -> Distiller:
    """Our distiller on the weights of a literal loop's transformer."""
    theirs, settings = loop.transformer, loop.settings
    with torch.device(theirs.device):
        network = SanaNetwork(SanaConfig.from_dict(dict(theirs.config)), time_table=True)
    state = {
        key.replace(".base_layer", ""): value
        for key, value in theirs.state_dict().items()
        if ".lora_" not in key
    }
    network.to(theirs.dtype).load_state_dict(state)

    def null_cond(cond: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, length = cond["mask"].shape
        text, mask = (y[:, :length].expand(rows, *y[:, :length].shape[1:]) for y in null)
        return {"text": text, "mask": mask}

    backbone = SharedBackbone(
        network,
        adapters=AdapterBank(network, rank=settings.rank, alpha=settings.alpha),
        sample_shape=sample_shape,
        null_cond=null_cond,
    )
    config = official_config(settings)
    kind = CapturedDistiller if theirs.device.type == "cuda" else Distiller
    distiller = kind(
        backbone, config, schedule=dpm_flow_schedule(settings.student_steps, shift=3.0)
    )
    distiller.objective = FixedInterval(config)
    distiller.objective.interval = interval
    return distiller


def make_updates(
    name: str, *, device: str = "cpu", interval: tuple[int, int] = INTERVAL
) -> dict[str, dict[str, Update]]:
    """{"aux", "student"} -> {"literal", "ours"} -> one update."""
    size = SIZES[name]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    loop, prompt, null = make_loop(size, device=device, dtype=dtype)
    ours = make_ours(loop, null, size.sample_shape, interval)
    cond = trim_text(prompt._asdict(), [size.prompt_tokens])

    def noise() -> Tensor:
        return torch.randn(1, *size.sample_shape, device=device).to(dtype)

    return {
        "aux": {
            "literal": lambda: loop.aux_update(noise(), prompt, AUX_TIME),
            "ours": lambda: ours.aux_step(cond),
        },
        "student": {
            "literal": lambda: loop.student_update(noise(), prompt, null, interval),
            "ours": lambda: ours.student_step(cond),
        },
    }


def measure(
    updates: dict[str, Update], repeats: int, device: str
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds of the process) of every implementation, which take turns."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in updates}
    for call in range(-WARMUP_CALLS[device], repeats):
        for name, update in updates.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            update()
            if device != "cpu":
                torch.cuda.synchronize()
            if call >= 0:
                taken = time.perf_counter() - start, time.process_time() - cpu_start
                samples[name].append(taken)
    return samples


def rows_of(update: str, samples: dict[str, list[tuple[float, float]]]) -> list[dict]:
    """Lines of the result; ``ratio`` is how many times as fast as the literal loop.

    On a machine that does other work, ``cpu_ratio`` is the one to read: waiting is not in it.
    """
    rows = []
    for name, taken in samples.items():
        line = {"update": update, "impl": name}
        for kind, ratio, seconds, literal in zip(
            ("seconds", "cpu_seconds"),
            ("ratio", "cpu_ratio"),
            zip(*taken, strict=True),
            zip(*samples["literal"], strict=True),
            strict=True,
        ):
            tenths = quantiles(seconds, n=10, method="inclusive")
            line[kind] = round(median(seconds), 4)
            line[f"{kind}_p10"], line[f"{kind}_p90"] = round(tenths[0], 4), round(tenths[-1], 4)
            line[ratio] = round(median(literal) / median(seconds), 3)
        rows.append(line)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--device", choices=WARMUP_CALLS, default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="2 or more")
    parser.add_argument("--interval", type=int, nargs=2, default=INTERVAL, metavar=("T", "R"))
    args = parser.parse_args()
    size = SIZES[args.size]
    config = {
        "size": args.size,
        "transformer": size.transformer,
        "sample_shape": size.sample_shape,
        "prompt_tokens": size.prompt_tokens,
        "interval": args.interval,
        "repeats": args.repeats,
    }
    head = header("sana_literal", args.device, config)
    rows = []
    torch.manual_seed(0)
    updates = make_updates(args.size, device=args.device, interval=tuple(args.interval))
    for update, implementations in updates.items():
        new = rows_of(update, measure(implementations, args.repeats, args.device))
        print(*new, sep="\n", flush=True)
        rows += new
    if args.out:
        write(args.out, head, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
