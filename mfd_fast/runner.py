"""One distillation from config to run folder, and opening a finished one."""

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mfd_fast.captured import CapturedDistiller
from mfd_fast.config import RunConfig, to_dict
from mfd_fast.distiller import Distiller
from mfd_fast.environment import environment
from mfd_fast.run_folder import RESULTS, STUDENT, RunFolder
from mfd_fast.tasks import Task, make_task
from mfd_fast.trainer import train


def run_distillation(config: RunConfig, out: Path) -> RunFolder:
    """Distil, save the student, print the result table, draw the pictures.

    ``ValueError`` or ``OSError`` before anything is written if the folder, the teacher file or a
    setting is unusable.
    """
    task = make_task(config)
    make = CapturedDistiller if config.train.capture else Distiller
    distiller = make(task.backbone(), config.distill)
    next_cond = task.conditions()
    run = RunFolder.create(out, config)
    print(f"distilling {config.preset} by {config.distill.objective} into {run.path}")

    start = time.perf_counter()
    with tqdm(total=config.train.updates, unit="update", dynamic_ncols=True) as bar:
        train(distiller, next_cond, config.train, callbacks=[run.log, lambda row: _show(bar, row)])
    seconds = time.perf_counter() - start

    task.save_student(distiller, run / STUDENT)
    rows = task.evaluate(run, config.num_eval_samples)
    run.write_json(
        RESULTS,
        {
            "environment": environment(distiller.backbone.device.type),
            "config": to_dict(config),
            "seconds": seconds,
            "updates": distiller.num_updates,
            "skipped_updates": int(distiller.skipped),
            "table": rows,
        },
    )
    print(task.format_table(rows))
    for path in [*task.draw_pictures(run), run / STUDENT, run / RESULTS]:
        print(path)
    return run


def open_run(folder: str | Path) -> tuple[RunFolder, Task]:
    """A finished run and its task; ``ValueError`` says what is missing."""
    run = RunFolder.open(folder)
    if not (run / STUDENT).is_file():
        raise ValueError(f"{run.path} has no {STUDENT}: the run did not finish; distil again")
    return run, make_task(run.config)


def _show(bar: tqdm, row: dict[str, Any]) -> None:
    bar.update(row["update"] - bar.n)
    bar.set_postfix_str(
        f"aux {row['aux_loss']:.4f}, distance {row['distance']:.3f}, "
        f"{row['updates_per_s']:.1f} updates/s"
    )
