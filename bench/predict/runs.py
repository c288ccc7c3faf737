"""What three whole runs would cost on two cards: the table of the first page.

No weights: the estimate of ``mfd-fast estimate PRESET --gpu CARD``, with the fastest profile that
fits the card at the preset's batch.
"""

from collections.abc import Iterator

from bench.running import Options
from mfd_fast.cost import device_named
from mfd_fast.cost.devices import assumed
from mfd_fast.cost.plans import best_of, cycles_of, profiles_of
from mfd_fast.models import preset
from mfd_fast.run.maker import run_is_captured

GPUS = ("rtx4090", "h100")
RUNS = ("sana-1.6b", "flux2-klein-4b", "occfm")


def row(name: str) -> dict:
    """One preset's run on every card."""
    config = preset(name).resolved()
    cycles = cycles_of(config)
    is_captured = run_is_captured(config, "cuda")
    number = config.train.updates / config.distill.student_updates
    made = {
        "preset": name,
        "updates": config.train.updates,
        "batch": config.train.batch_size,
        "steps": config.distill.student_steps,
        "is_captured": is_captured,
    }
    for gpu in GPUS:
        device = device_named(gpu)
        efficiency = assumed(is_captured=is_captured)
        profiles = profiles_of(cycles, device, efficiency, is_captured=is_captured)
        best = best_of(profiles, device)
        made[gpu] = {
            "fits": best.bytes <= device.memory,
            "gb": round(best.bytes / 1e9, 1),
            "hours": [round(number * end / 3600, 3) for end in best.seconds],
            "activation": best.activation,
            "optimizer": best.optimizer,
        }
    return made


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    used = assumed(is_captured=True)
    config = {
        "gpus": {gpu: device_named(gpu).source for gpu in GPUS},
        "shares": used.shares,
        "efficiency": used.source,
    }
    return "runs", config, ([row(name)] for name in RUNS if options.wants(name))
