"""The seconds that updates are predicted to take, beside what they took, at shapes of their own.

Predictions come from ``bench/results/step_*.json`` of this device (``mfd_fast.cost.measured``); no
case was measured for them: other batches, image sizes, intervals and activation policies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from bench.running import Options, timed
from bench.updates import networks
from bench.updates.variants import SANA_SIZES, STEP, working_dtype
from mfd_fast.cost import this_machine, trace_cycle
from mfd_fast.cost.measured import calibrated
from mfd_fast.cost.phases import cycle_phases, total
from mfd_fast.distill.captured import CapturedDistiller
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.models import preset
from mfd_fast.models.digits.task import DigitsTask
from mfd_fast.run.task import Shapes

REPEATS = 5
WARMUP = {"cpu": 1, "cuda": 5}  # updates of a role; graphs are captured in them


@dataclass(frozen=True)
class Case:
    """A shape that no calibration has: ``model`` is the preset whose result is used."""

    model: str
    batch: int
    interval: float
    side: int = 0
    activation: str = "none"
    student_steps: int = 1

    @property
    def name(self) -> str:
        """What differs from the calibration."""
        parts = [f"{self.model}, batch {self.batch}", f"{round(self.interval / STEP)} ODE steps"]
        parts += [f"{self.side}x{self.side} latents"] if self.side else []
        parts += [self.activation] if self.activation != "none" else []
        return ", ".join(parts)

    @property
    def config(self) -> DistillConfig:
        """One update of each role, every interval as long."""
        return DistillConfig(
            aux_updates=1,
            step_size=STEP,
            student_steps=self.student_steps,
            min_interval=self.interval - STEP / 2,  # as many steps
            max_interval=self.interval,
        )


CASES = {
    "cpu": (
        Case("digits", batch=32, interval=0.4),
        Case("digits", batch=512, interval=0.1),
        Case("sana-mini", batch=1, interval=0.1, side=24, student_steps=2),
        Case("sana-mini", batch=3, interval=0.06, student_steps=4),
        Case("sana-mini", batch=1, interval=0.2, activation="block", student_steps=4),
    ),
    "cuda": (
        Case("digits", batch=96, interval=0.4),
        Case("sana-1.6b", batch=3, interval=0.1, side=32, student_steps=4),
        Case("sana-1.6b", batch=1, interval=0.3, side=64, student_steps=2),
        Case("sana-1.6b", batch=4, interval=0.2, side=16, activation="block", student_steps=4),
    ),
}


def make_model(case: Case, device: str) -> Shapes:
    """The networks of a case on a device or on ``meta``."""
    if case.model == "digits":
        task = DigitsTask(preset("digits"))
        task.teacher.to(device)
        return Shapes(task.backbone(), lambda n: torch.zeros(n, dtype=int, device=device))
    dtype = working_dtype("cuda" if torch.cuda.is_available() else "cpu")
    size = SANA_SIZES[case.model]
    return networks.make_sana(size, device, dtype, activation=case.activation, side=case.side)


def measured(case: Case, device: str, repeats: int) -> dict[str, float]:
    """Seconds of an update of each role, as the calibration ran: as graphs on a GPU."""
    model = make_model(case, device)
    kind = Distiller if device == "cpu" else CapturedDistiller
    distiller, cond = kind(model.backbone, case.config), model.cond(case.batch)
    updates = {"aux": distiller.aux_step, "student": distiller.student_step}
    seconds = {}
    for role, update in updates.items():
        one = {role: partial(update, cond)}
        taken = timed(one, repeats, device, warmup=WARMUP[device])[role]
        seconds[role] = median(clock for clock, _ in taken)
    return seconds


def predicted(case: Case, device: str) -> tuple[dict[str, float], str]:
    """Seconds of an update of each role and their source; ``ValueError`` without a calibration."""
    known = calibrated(this_machine(device), case.model, is_captured=device == "cuda")
    if known is None:
        raise ValueError(
            f"no measured updates of {case.model} on this device; first: python -m bench "
            f"step_{case.model.replace('-', '_').replace('.', '_')} --out bench/results"
        )
    cycle = trace_cycle(make_model(case, "meta"), case.config, case.batch)
    phases = cycle_phases(cycle, *known)
    roles = {
        role: total(phase for name, phase in phases.items() if name.startswith(role)).high
        for role in ("aux", "student")
    }
    return roles, known[1].source


def rows_of(case: Case, device: str, repeats: int) -> list[dict]:
    """Both roles of a case."""
    expected, source = predicted(case, device)
    taken = measured(case, device, repeats)
    return [
        {
            "case": case.name,
            "update": role,
            "predicted_s": round(expected[role], 5),
            "measured_s": round(taken[role], 5),
            "ratio": round(expected[role] / taken[role], 3),
            "source": source,
        }
        for role in taken
    ]


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    device, repeats = options.device, options.repeats or REPEATS
    cases = [case for case in CASES[device] if options.wants(case.name)]
    batches = (rows_of(case, device, repeats) for case in cases)
    return "predicted_time", {"repeats": repeats}, batches
