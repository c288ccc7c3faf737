"""The runs of the evaluations study: a place, a setting, a seed; each leaves a JSON file.

A run that is done is not repeated, so an interrupted study goes on where it was.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from mfd_fast.backbones.lanes import CopiedBackbone
from mfd_fast.cost.cycle import evaluations_of_lane, forward_evaluations
from mfd_fast.distill.config import DistillConfig, OptimConfig
from mfd_fast.distill.distiller import Distiller
from mfd_fast.files.whole import write_text
from mfd_fast.models import preset
from mfd_fast.models.occfm.data.classes import FREE, SPLITS
from mfd_fast.models.occfm.data.store import convert_split
from mfd_fast.models.occfm.data.synthetic import SyntheticConfig, write_synthetic
from mfd_fast.models.occfm.evaluate import decoded
from mfd_fast.models.occfm.loading import load_vae
from mfd_fast.models.occfm.pretrain import (
    TEACHER,
    VAE,
    TeacherPretrain,
    VaePretrain,
    cache_latents,
    pretrain_teacher,
    pretrain_vae,
)
from mfd_fast.models.occfm.scores import OccupancyCounts
from mfd_fast.models.occfm.task import OccfmTask
from mfd_fast.run.config import RunConfig, TrainConfig
from mfd_fast.run.environment import commit
from mfd_fast.run.loop import Progress, train
from mfd_fast.run.maker import make_distiller
from studies.digits_runs import digits_config, measured
from studies.savings import ByNeed, SeveralEnds, TwoNodes
from studies.toy_runs import energy_distance, teacher_samples, toy_config, toy_teacher
from studies.toys import sample_toy

Quality = dict[str, float]

DIGITS_SAMPLES, TOY_SAMPLES, WINDOWS, WINDOWS_AT_ONCE = 2000, 4000, 32, 8
SCENES, GRID, VAE_UPDATES, TEACHER_UPDATES = 24, (40, 40, 4), 400, 450


@dataclass(frozen=True)
class Setting:
    """What a run differs in from the preset of its place.

    objective, by_need: of ``studies.savings``, which are no settings.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    objective: type[SeveralEnds] | type[TwoNodes] | None = None
    by_need: bool = False


def digits(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """The digits preset: 400 updates of 64 samples."""
    config = digits_config(updates=400, seed=seed, **setting.overrides)
    task = config.task()
    distiller = make_distiller(task.backbone(), config.distill)
    return followed(distiller, task.conditions(), config.train, (100, 200, 300, 400), of_digits)


def of_digits(distiller: Distiller) -> Quality:
    """Frechet distance to the 50-step teacher, and recall."""
    found = measured(distiller, DIGITS_SAMPLES)
    return {"FD": found["frechet_to_teacher50"], "recall": found["recall"]}


def toy(name: str, setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """A toy: 150 updates of 128 samples, Euler with h = .05, 5 : 1."""
    config = toy_config(seed=seed, **setting.overrides)
    objective = setting.objective and setting.objective(config)
    backbone = CopiedBackbone(toy_teacher(name), sample_shape=(2,))
    distiller = Distiller(backbone, config, objective=objective)
    loop, cond = TrainConfig(updates=150, batch_size=128, device="cpu"), torch.empty(128, 0)
    quality = partial(of_toy, name)
    if setting.by_need:
        need = ByNeed(config.aux_updates)
        for _ in range(loop.updates):
            need.cycle(distiller, cond)
        spent = {"aux/generate": need.made / need.cycles, "aux/forward": need.made / need.cycles}
        point = {"updates": loop.updates, **quality(distiller)}
        return {"evaluations": evaluations(config, loop.batch_size) | spent, "curve": [point]}
    result = followed(distiller, lambda n: cond, loop, (50, 100, 150), quality)
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


def occfm(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """OccFM on made-up scenes: 24 updates of 4 windows, Euler with h = .05, 5 : 1."""
    task = OccfmTask(occfm_config(folder, seed, setting.overrides))
    distiller = make_distiller(task.backbone(), task.config.distill, schedule=task.schedule())
    quality = partial(of_occfm, task)
    return followed(distiller, task.conditions(), task.config.train, (24,), quality)


def occfm_config(folder: Path, seed: int, overrides: Mapping[str, Any]) -> RunConfig:
    """``occfm-tiny`` on the files in ``folder``, with the learning rates of ``make occfm-demo``."""
    base = preset("occfm-tiny")
    files = occfm_files(folder / "occfm-files")
    rates = {
        f"{role}_optim": OptimConfig(lr=lr, weight_decay=0.0, warmup_updates=5)
        for role, lr in (("student", 2e-4), ("aux", 5e-4))
    }
    settings = {"step_size": 0.05, "aux_updates": 5, "ema_decay": 0.9, "seed": seed, **rates}
    return replace(
        base,
        teacher=str(files["teacher"]),
        distill=replace(base.distill, **(settings | overrides)),
        train=replace(base.train, updates=24, batch_size=4, device="cpu"),
        occfm=replace(base.occfm, store=str(files["store"]), vae=str(files["vae"])),
    )


@cache
def occfm_files(folder: Path) -> dict[str, Path]:
    """Made-up scenes, a VAE and a teacher trained on them; made once."""
    files = {"vae": folder / VAE, "teacher": folder / TEACHER, "store": folder / "store"}
    if files["teacher"].exists():
        return files
    write_synthetic(folder / "data", SyntheticConfig(scenes=SCENES, grid=GRID, voxel=1.0))
    for split in SPLITS:
        convert_split(folder / "data", folder / "labels", split)
    recipe = {"batch_size": 6, "lr": 3e-3, "warmup_updates": 20, "device": "cpu"}
    labels = str(folder / "labels")
    pretrain_vae(VaePretrain(store=labels, updates=VAE_UPDATES, **recipe), folder)
    vae = load_vae(files["vae"])
    for split in SPLITS:
        cache_latents(folder / "data", split, vae)
        convert_split(folder / "data", files["store"], split)
    recipe |= {"batch_size": 8, "lr": 2e-3, "warmup_updates": 30, "ema_decay": 0.97}
    store = str(files["store"])
    pretrain_teacher(TeacherPretrain(store=store, updates=TEACHER_UPDATES, **recipe), folder)
    return files


def of_occfm(task: OccfmTask, distiller: Distiller) -> Quality:
    """IoU and mIoU in percent, mean over the frames of validation windows."""
    windows, scale = task.validation, task.teacher.config.latent_scale
    rows = windows.spread(WINDOWS)
    counts = OccupancyCounts(frames=windows.shape[0], free=FREE)
    for start in range(0, len(rows), WINDOWS_AT_ONCE):
        part = rows[start : start + WINDOWS_AT_ONCE]
        latents = distiller.generate(windows.noise(part, 1), windows.cond(part)) / scale
        counts.add(decoded(task.decoder, latents), windows.truth(part))
    found = counts.scores().row()
    return {"IoU": found["iou_mean_of_frames"], "mIoU": found["miou_mean_of_frames"]}


PLACES: dict[str, Callable[[Setting, int, Path], dict[str, Any]]] = {
    "digits": digits,
    "gaussian_mixture": partial(toy, "gaussian_mixture"),
    "two_moons": partial(toy, "two_moons"),
    "occfm": occfm,
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
    """A run's numbers: from its file, or made now and written there."""
    path = folder / f"{place}, {name}, seed {seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    result = PLACES[place](setting, seed, folder) | {"seed": seed, "commit": commit()}
    write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"{path.stem}: {result['curve'][-1]}", flush=True)
    return result
