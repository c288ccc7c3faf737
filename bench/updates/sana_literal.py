"""One student and one auxiliary update of SANA: the literal diffusers + PEFT loop against ours.

Both do the same work (``test_sana_official_gradients.py``): published settings, one sample,
a fixed interval (t, r) so that both take the same number of solver steps, the same random weights,
in one process with the same threads, taking turns.  Differences that are ours: text is prepared
once and without its padding, the three lanes of an ODE step are one call; on a GPU the phases are
CUDA graphs.

    python -m bench sana_literal --out bench/results
"""

from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor

from bench.running import Options, spread, timed
from bench.updates.literal import GRID, LiteralLoop, OfficialSettings, Prompt, make_loop
from bench.updates.sana_sizes import SIZES
from bench.updates.variants import FixedInterval
from mfd_fast import (
    CapturedDistiller,
    DistillConfig,
    Distiller,
    SharedBackbone,
    dpm_flow_schedule,
)
from mfd_fast.backbones.adapters import AdapterBank
from mfd_fast.distill.config import OptimConfig
from mfd_fast.models.sana import SanaConfig, SanaNetwork
from mfd_fast.models.sana.text.trim import trim_text

INTERVAL = (670, 330)  # 17 steps of .02, the mean of uniform pairs
SMOKE_INTERVAL = (80, 40)
AUX_TIME = 500
REPEATS = 9
# Calls that are not counted; on a GPU ours captures its graphs in them.
WARMUP_CALLS = {"cpu": 1, "cuda": 6}

Update = Callable[[], object]


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
    distiller.objective = FixedInterval(config, tuple(end / GRID for end in interval))
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


def rows_of(update: str, samples: dict[str, list[tuple[float, float]]]) -> list[dict]:
    """Lines of the result; ``ratio`` is how many times as fast as the literal loop.

    On a machine that does other work, ``cpu_ratio`` is the one to read: waiting is not in it.
    """
    rows = []
    literal = [median(kind) for kind in zip(*samples["literal"], strict=True)]
    for name, taken in samples.items():
        clock, processor = zip(*taken, strict=True)
        rows.append(
            {
                "update": update,
                "impl": name,
                **spread(clock, "seconds", 1.0, 4),
                "ratio": round(literal[0] / median(clock), 3),
                **spread(processor, "cpu_seconds", 1.0, 4),
                "cpu_ratio": round(literal[1] / median(processor), 3),
            }
        )
    return rows


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    """Auxiliary and student; on a GPU SANA 1.6B."""
    name = "tiny" if options.smoke else {"cpu": "mini", "cuda": "1.6b"}[options.device]
    size, interval = SIZES[name], SMOKE_INTERVAL if options.smoke else INTERVAL
    repeats = options.repeats or (2 if options.smoke else REPEATS)
    config = {
        "size": name,
        "transformer": size.transformer,
        "sample_shape": size.sample_shape,
        "prompt_tokens": size.prompt_tokens,
        "interval": interval,
        "repeats": repeats,
    }

    def batches() -> Iterator[list[dict]]:
        torch.manual_seed(0)
        device, warmup = options.device, WARMUP_CALLS[options.device]
        for update, impls in make_updates(name, device=device, interval=interval).items():
            if options.wants(update):
                yield rows_of(update, timed(impls, repeats, device, warmup=warmup))

    return "sana_literal", config, batches()
