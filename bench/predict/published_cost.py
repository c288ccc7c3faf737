"""What one cycle of the published SANA loop does, part by part, from traces without storage.

The literal loop of ``bench.updates.literal`` with its text encoder and image decoder at 1024px: a
part is traced once and taken as often as a cycle of 10 auxiliary updates and 1 student update asks.
Seconds are the estimate's for an RTX PRO 6000 with assumed shares, launches from Python included;
not counted: clipping, the optimizer, writing the PNG, waiting for the device, reading data.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench.predict.table4 import GPU, PRESET
from bench.running import Options
from bench.updates.literal import AUX, STUDENT, LiteralLoop, OfficialSettings, Prompt, make_loop
from bench.updates.sana_literal import official_config
from bench.updates.sana_sizes import SIZES, Published
from mfd_fast.cost import device_named, trace_cycle
from mfd_fast.cost.cycle import expected_evaluations
from mfd_fast.cost.devices import assumed
from mfd_fast.cost.phases import phase_of
from mfd_fast.cost.shapes import shapes_of
from mfd_fast.cost.trace import Trace, Work
from mfd_fast.distill.config import DistillConfig
from mfd_fast.models import preset
from mfd_fast.run.config import RunConfig

AUX_UPDATES = 10
SIZE = SIZES["1.6b"]


def traced(run: Callable[[], object]) -> Work:
    """The work of one call."""
    with Trace() as trace:
        run()
    return trace.work[""]


def evaluations() -> float:
    """E[N] of an integration with the published settings: uniform pairs, h = .02."""
    counts = expected_evaluations(official_config(OfficialSettings()), 1)
    return sum(counts.values())


def parts() -> dict[str, tuple[float, Work]]:
    """Part -> times a cycle, work of one time."""
    loop, prompt, null = make_loop(SIZE, device="meta", dtype=torch.bfloat16)
    loop.transformer.to("meta")  # PEFT leaves its factors on the CPU
    besides = Published(SIZE, device="meta", dtype=torch.bfloat16)
    latent = torch.empty(1, *SIZE.sample_shape, device="meta")
    x, expected, steps = latent.to(torch.bfloat16), evaluations(), loop.settings.student_steps
    updates = AUX_UPDATES + 1
    work: dict[str, tuple[float, Work]] = {}
    with torch.no_grad():
        work["encode a prompt"] = updates, traced(lambda: besides.encode(*besides.prompt()))
        work["encode the empty prompt"] = 1, traced(lambda: besides.encode(*besides.empty()))
        work["student, no gradient"] = AUX_UPDATES * steps, _evaluation(loop, STUDENT, prompt, x)
        work["auxiliary, no gradient"] = expected, _evaluation(loop, AUX, prompt, x)
        loop.use(None)
        guided = loop.guided(prompt, null)
        work["teacher, guided"] = expected, traced(lambda: guided(x, 500))
        work["decode an image, float32"] = 1, traced(lambda: besides.decoder(latent))
    for role, times in ((AUX, AUX_UPDATES), (STUDENT, steps)):
        loop.use(role)
        velocity = loop.velocity(prompt)
        forward_and_backward = traced(lambda v=velocity: v(x, 500).sum().backward())
        work[f"{role}, forward and backward"] = times, forward_and_backward
    return work


def _evaluation(loop: LiteralLoop, role: str, prompt: Prompt, x: torch.Tensor) -> Work:
    loop.use(role)
    velocity = loop.velocity(prompt)
    return traced(lambda: velocity(x, 500))


def operators_of_ours() -> float:
    """Operators of one ODE step of this engine, three lanes."""
    config = preset(PRESET)
    model = shapes_of(config)
    few, more = (
        trace_cycle(model, _interval(config, steps), 1).phases["student/integrate"].num_ops
        for steps in (1, 2)
    )
    return more - few


def _interval(config: RunConfig, steps: int) -> DistillConfig:
    """Every interval takes as many steps."""
    length = steps * config.distill.step_size
    return replace(config.distill, min_interval=length - 0.005, max_interval=length)


def row(name: str, times: float, work: Work) -> dict:
    """One part of the cycle."""
    phase = phase_of(work, device_named(GPU), assumed(is_captured=False))
    return {
        "part": name,
        "times": round(times, 2),
        "tflop": round(times * work.flops / 1e12, 2),
        "operators": round(times * work.num_ops),
        "gb": round(times * work.bytes / 1e9, 1),
        "device_seconds": round(times * phase.device, 3),
        "seconds": round(times * phase.seconds.low, 3),
        "seconds_high": round(times * phase.seconds.high, 3),
        "operators_once": round(work.num_ops),
    }


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    config = {
        "gpu": GPU,
        "efficiency": assumed(is_captured=False).source,
        "evaluations": round(evaluations(), 2),
        "operators_of_an_ode_step_of_ours": round(operators_of_ours()),
    }
    rows = [row(name, times, work) for name, (times, work) in parts().items()]
    return "published_cost", config, iter([rows])
