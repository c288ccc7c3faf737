"""The runs of the evaluations study: a place, a setting, a seed; each leaves a JSON file.

A run that is done is not repeated, so an interrupted study goes on where it was.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.cost.cycle import evaluations_of_lane, forward_evaluations
from mfd_fast.distill.config import DistillConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.files.whole import write_text
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.environment import commit
from mfd_fast.run.loop import Progress, train
from mfd_fast.run.maker import make_distiller
from studies.digits_runs import digits_config, measured
from studies.savings import ByNeed, SeveralEnds, TwoNodes
from studies.toy_runs import energy_distance, teacher_samples, toy_config, toy_teacher
from studies.toys import sample_toy

Quality = dict[str, float]

DIGITS_SAMPLES, TOY_SAMPLES = 2000, 4000


@dataclass(frozen=True)
class Setting:
    """What a run differs in from the preset of its place.

    objective, by_need: of ``studies.savings``, which are no settings.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    objective: type[SeveralEnds] | type[TwoNodes] | None = None
    by_need: bool = False


def digits(setting: Setting, seed: int) -> dict[str, Any]:
    """The digits preset: 400 updates of 64 samples."""
    config = digits_config(updates=400, seed=seed, **setting.overrides)
    task = config.task()
    distiller = make_distiller(task.backbone(), config.distill)
    return followed(distiller, task.conditions(), config.train, (100, 200, 300, 400), of_digits)


def of_digits(distiller: Distiller) -> Quality:
    """Frechet distance to the 50-step teacher, and recall."""
    found = measured(distiller, DIGITS_SAMPLES)
    return {"FD": found["frechet_to_teacher50"], "recall": found["recall"]}


def toy(
    name: str, setting: Setting, seed: int, *, batch: int = 128, updates: int = 150
) -> dict[str, Any]:
    """A toy: 150 updates of 128 samples if nothing else is said, Euler with h = .05, 5 : 1."""
    config = toy_config(seed=seed, **setting.overrides)
    objective = setting.objective and setting.objective(config)
    backbone = CopiedBackbone(toy_teacher(name), sample_shape=(2,))
    distiller = Distiller(backbone, config, objective=objective)
    loop = TrainConfig(updates=updates, batch_size=batch, device="cpu")
    cond = torch.empty(batch, 0)
    quality = partial(of_toy, name)
    if setting.by_need:
        need = ByNeed(config.aux_updates)
        for _ in range(loop.updates):
            need.cycle(distiller, cond)
        spent = {"aux/generate": need.made / need.cycles, "aux/forward": need.made / need.cycles}
        point = {"updates": loop.updates, **quality(distiller)}
        return {"evaluations": evaluations(config, loop.batch_size) | spent, "curve": [point]}
    points = (updates // 3, updates * 2 // 3, updates)
    result = followed(distiller, lambda n: cond, loop, points, quality)
    if objective:
        lanes = len(objective.lanes)
        result["evaluations"]["student/integrate"] = lanes * objective.evaluations()
    return result


def of_toy(name: str, distiller: Distiller) -> Quality:
    """Energy distance of one-step samples to the teacher's, and to the distribution itself."""
    noise = torch.randn(TOY_SAMPLES, 2, generator=Generator().manual_seed(1))
    samples = distiller.generate(noise, torch.empty(TOY_SAMPLES, 0))
    return {
        "to teacher": energy_distance(samples, teacher_samples(name, TOY_SAMPLES, seed=2)),
        "to data": energy_distance(samples, sample_toy(name, TOY_SAMPLES, exact_generator())),
    }


def exact_generator() -> Generator:
    """Of the samples of a toy's exact distribution: the same in every run."""
    return Generator().manual_seed(3)


PLACES: dict[str, Callable[[Setting, int], dict[str, Any]]] = {
    "digits": digits,
    "gaussian_mixture": partial(toy, "gaussian_mixture"),
    "two_moons": partial(toy, "two_moons"),
    "two_moons, 4 steps": partial(toy, "two_moons"),
    "two_moons, batch 1": partial(toy, "two_moons", batch=1, updates=300),
}


def followed(
    distiller: Distiller,
    next_cond: Callable[[int], Any],
    config: TrainConfig,
    points: tuple[int, ...],
    quality: Callable[[Distiller], Quality],
) -> dict[str, Any]:
    """Train, and measure after each of ``points`` student updates.

    Seconds are those of training alone.
    """
    progress, curve, seconds = Progress(distiller), [], 0.0
    for updates in points:
        start = time.perf_counter()
        train(distiller, next_cond, replace(config, updates=updates), progress=progress)
        seconds += time.perf_counter() - start
        curve.append({"updates": updates, "seconds": seconds, **quality(distiller)})
    spent = evaluations(distiller.config, config.batch_size)
    return {"evaluations": spent, "curve": curve}


def evaluations(config: DistillConfig, rows: int) -> dict[str, float]:
    """phase -> forward evaluations of a sample in a cycle."""
    return forward_evaluations(config, evaluations_of_lane(config, rows))


def result_of(place: str, name: str, setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """The numbers of one run of a place."""
    path = folder / f"{place}, {name}, seed {seed}.json"
    return kept(path, seed, partial(PLACES[place], setting, seed))


def kept(path: Path, seed: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A run's numbers: from its file, or made now and written there."""
    if path.is_file():
        return json.loads(path.read_text())
    result = run() | {"seed": seed, "commit": commit()}
    write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"{path.stem}: {result['curve'][-1]}", flush=True)
    return result
