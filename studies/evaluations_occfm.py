"""Savings of evaluations on OccFM: made-up scenes, a small VAE and teacher trained on them.

The preset is ``occfm-tiny`` with the learning rates of ``make occfm-demo``, Euler with h = .05 and
5 : 1; beside it two savings, the same seeds, the same number of student updates.  The interval is
that of the evaluations study.  A core takes about an hour for it.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mfd_fast.distill.config import OptimConfig
from mfd_fast.distill.distiller import Distiller
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
from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import make_distiller
from studies.evaluation_runs import Quality, followed
from studies.evaluations import compared, judged, saved
from studies.plots import COLOURS, GREY, Figure, titled
from studies.verdict import Verdict

CLAIM = "None in the paper: Euler steps and new samples for each auxiliary update are given"
RULE = (
    "AB2 alone and with a cycle's samples: the paired 95 % intervals of IoU and mIoU reach zero "
    "or the better side"
)
METRICS = ("IoU", "mIoU")
STEP_SIZE = 0.05
UPDATES, WINDOWS, WINDOWS_AT_ONCE = 24, 32, 8
SCENES, GRID, VAE_UPDATES, TEACHER_UPDATES = 24, (40, 40, 4), 400, 450


def run(seed: int, folder: Path) -> dict[str, Any]:
    runs = folder / "evaluations-occfm"
    files = files_in(runs)
    found = saved(lambda seed, of: distilled(config_of(files, seed, **of)), STEP_SIZE, seed, runs)
    return {"rows": compared(found), "start": start(config_of(files, seed))}


def files_in(folder: Path) -> dict[str, Path]:
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


def config_of(files: dict[str, Path], seed: int, **settings: Any) -> RunConfig:
    """The preset's run on these files."""
    base = preset("occfm-tiny")
    student, aux = (OptimConfig(lr=lr, weight_decay=0.0, warmup_updates=5) for lr in (2e-4, 5e-4))
    ours = {
        **{"step_size": STEP_SIZE, "aux_updates": 5, "ema_decay": 0.9, "seed": seed},
        **{"student_optim": student, "aux_optim": aux},
    }
    distill = replace(base.distill, **ours | settings)
    return replace(
        base,
        teacher=str(files["teacher"]),
        distill=distill,
        train=replace(base.train, updates=UPDATES, batch_size=4, device="cpu"),
        occfm=replace(base.occfm, store=str(files["store"]), vae=str(files["vae"])),
    )


def distilled(config: RunConfig) -> dict[str, Any]:
    """One run, measured at its end."""
    task = OccfmTask(config)
    distiller = make_distiller(task.backbone(), config.distill, schedule=task.schedule())
    points, quality = (config.train.updates,), partial(quality_of, task)
    return followed(distiller, task.conditions(), config.train, points, quality)


def start(config: RunConfig) -> Quality:
    """The student before its first update, a copy of the teacher, in one step."""
    task = OccfmTask(config)
    return quality_of(task, make_distiller(task.backbone(), config.distill))


def quality_of(task: OccfmTask, distiller: Distiller) -> Quality:
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


def draw(figures: dict[str, Any], path: Path) -> None:
    rows = figures["rows"]
    figure = Figure(columns=2, title="OccFM on made-up scenes, the preset and two savings by seed")
    for axis, metric in zip(figure.axes, METRICS, strict=True):
        for (name, row), colour in zip(rows.items(), (GREY, *COLOURS), strict=False):
            values = [run["curve"][-1][metric] for run in row["runs"]]
            label = f"{name}, {row['evaluations']:.1f} evaluations"
            axis.plot(range(len(values)), values, "o", color=colour, label=label)
        axis.axhline(figures["start"][metric], color=GREY, linestyle=":", label="before training")
        axis.set_xticks(range(len(values)))
        titled(axis, metric, "seed", "percent")
    figure.axes[1].legend(fontsize=8, frameon=False, loc="center right")
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    return judged(figures["rows"], METRICS)
