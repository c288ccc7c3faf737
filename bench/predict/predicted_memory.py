"""The memory a cycle is predicted to need, beside what it needed.

Every case runs in a process of its own, after a small run that loads what is loaded once.

On a CPU: growth of the process's RSS.  The allocator returns what is freed
(``MALLOC_MMAP_THRESHOLD_``), so that the highest RSS is the highest sum of what was alive.
On a GPU: the most that torch's allocator had given out while updates ran, above what it had before;
of a captured run, what it keeps reserved afterwards, for graphs keep their pools.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench.running import Options, elsewhere
from bench.updates import networks
from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.cost import trace_cycle
from mfd_fast.cost.plans import memory_of
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.models import preset
from mfd_fast.models.digits.task import DigitsTask
from mfd_fast.models.occfm import CONFIGS
from mfd_fast.models.occfm.network import OccfmNetwork, null_condition
from mfd_fast.run.task import Shapes

UPDATES = 4  # two cycles of one auxiliary and one student update
CAPTURED_UPDATES = 12  # three warm-up updates of each role, then its graphs, then replays
SMALL_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def digits(device: str) -> Shapes:
    """The packaged DiT, three full copies."""
    task = DigitsTask(preset("digits"))
    task.teacher.to(device)
    return Shapes(task.backbone(), partial(torch.zeros, dtype=torch.int64, device=device))


def occfm_tiny(device: str) -> Shapes:
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

    return Shapes(backbone, cond)


class Case(NamedTuple):
    """A model by the device it is on, samples an update, whether its updates are graphs, and the
    guidance (1 where the network is told it).
    """

    make: Callable[[str], Shapes]
    batch: int
    is_captured: bool = False
    guidance: float = DistillConfig().guidance


mini = partial(networks.make_sana, "mini", dtype=torch.float32)
large = partial(networks.make_sana, "1.6b", dtype=torch.bfloat16)
CASES = {
    "digits": Case(digits, 512),
    "sana-mini": Case(mini, 4),
    "sana-mini, block": Case(partial(mini, activation="block"), 4),
    "occfm-tiny": Case(occfm_tiny, 8),
}
GPU_CASES = {
    "digits": Case(digits, 512),
    "sana-mini": Case(mini, 4),
    "occfm-tiny": Case(occfm_tiny, 8),
    "sana-1.6b": Case(large, 2),
    "sana-1.6b, block": Case(partial(large, activation="block"), 2),
    "sana-1.6b, captured": Case(large, 1, is_captured=True),
}


def cases_of(device: str) -> dict[str, Case]:
    """The cases that are measured on "cpu" or "cuda"."""
    return GPU_CASES if device == "cuda" else CASES


def settings() -> DistillConfig:
    """One auxiliary and one student update, two-step student, four-step intervals."""
    return DistillConfig(aux_updates=1, student_steps=2, step_size=0.25, ema_decay=0.99)


def settings_of(case: Case) -> DistillConfig:
    return replace(settings(), guidance=case.guidance)


def predicted(case: Case) -> dict[str, float]:
    """Bytes by component; a GPU's context is left out, as it is in what is measured."""
    cycle = trace_cycle(case.make("meta"), settings_of(case), case.batch)
    return memory_of(cycle, is_captured=case.is_captured, has_context=False)


def measured(case: Case, device: str = "cpu") -> int:
    """Bytes that a few cycles need above what the process had before them."""
    if device == "cpu":
        return _measured_rss(case)
    run(case, device, batch=1)
    gc.collect()
    torch.cuda.empty_cache()
    counted = torch.cuda.memory_reserved if case.is_captured else torch.cuda.memory_allocated
    before = counted()
    distiller = run(case, device)  # alive until it is counted
    after = counted() if case.is_captured else torch.cuda.max_memory_allocated()
    del distiller
    return after - before


def _measured_rss(case: Case) -> int:
    """What the RSS of this process grows by, at its highest."""
    run(case, "cpu", batch=1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest RSS is counted from now on
    before = _status("VmRSS")
    run(case, "cpu")
    return _status("VmHWM") - before


def run(case: Case, device: str, batch: int = 0) -> Distiller:
    """A few updates, of ``case.batch`` samples if ``batch`` is 0."""
    model = case.make(device)
    kind = CapturedDistiller if case.is_captured else Distiller
    distiller = kind(model.backbone, settings_of(case))
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # making a network in 16 bits passes through float32
    for _ in range(CAPTURED_UPDATES if case.is_captured else UPDATES):
        distiller.step(model.cond(batch or case.batch))
    return distiller


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measured_elsewhere(name: str, device: str) -> int:
    """:func:`measured` in a process of its own."""
    return elsewhere(measured_case, name, device, **SMALL_HEAP)


def measured_case(name: str, device: str) -> int:
    return measured(cases_of(device)[name], device)


def row(name: str, batch: int, device: str = "cpu") -> dict:
    """Both numbers of one case, in megabytes."""
    parts = predicted(cases_of(device)[name])
    return {"case": name, "batch": batch} | compared(parts, measured_elsewhere(name, device))


def compared(parts: dict[str, float], growth: int) -> dict:
    """Predicted bytes by part beside the measured ones."""
    total = sum(parts.values())
    return {
        "predicted_mb": round(total / 1e6, 1),
        "measured_mb": round(growth / 1e6, 1),
        "ratio": round(total / growth, 3),
        "parts_mb": {part: round(size / 1e6, 2) for part, size in parts.items()},
    }


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    config = {key: str(value) for key, value in vars(settings()).items()}
    cases = {name: one for name, one in cases_of(options.device).items() if options.wants(name)}
    batches = ([row(name, case.batch, options.device)] for name, case in cases.items())
    return "predicted_memory", config, batches
