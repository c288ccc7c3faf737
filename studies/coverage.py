"""Coverage (paper D.1, Table 6): its methods as the paper compares them, without a condition's
guidance (w = 1), from one teacher and with one network.

After the same number of student updates, and after the same work: as many updates as make mfd's
floating-point operations, counted over ``COUNTED`` cycles.  For every method two learning rates of
the student are tried with one seed; the better one, by the Frechet distance to the data, is run
with the other seeds.  Runs that are done are not repeated.  Students of meanflow and imm start as
the teacher too, where the paper trains them from scratch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from mfd_fast.files.whole import write_text
from mfd_fast.run.config import RunConfig
from mfd_fast.run.maker import make_distiller
from studies.digits_runs import (
    digits_config,
    distil,
    mean_and_spread,
    measured,
    student_lr,
)
from studies.plots import Figure, bars
from studies.verdict import Verdict

CLAIM = (
    "MFD achieves the best FID and recall among all single-step methods (D.1, Table 6, CIFAR-10: "
    "MFD 22.65, .212; Diff-Instruct 29.10, .190; DMD2 26.47, .173; IMM 26.02, .188; MeanFlow "
    "24.36, .207)"
)
RULE = (
    "mfd has the smallest mean Frechet distance to the data and the largest mean recall of the "
    "five methods, at equal updates and at equal work"
)
METHODS = ("mfd", "vsd", "dmd2", "imm", "meanflow")
LEARNING_RATES = (3e-4, 1e-3)
NUM_SEEDS = 3
UPDATES = 100
COUNTED = 2
NUM_SAMPLES = 1000
KEYS = ("frechet_to_teacher50", "frechet_to_data", "precision", "recall", "accuracy")
SELECTED_BY = "frechet_to_data"
BUDGETS = ("updates", "work")


@dataclass(frozen=True)
class Run:
    """One training of the study."""

    method: str
    lr: float
    seed: int
    updates: int

    @property
    def file(self) -> str:
        return f"{self.method}_lr{self.lr:g}_updates{self.updates}_seed{self.seed}.json"

    def config(self) -> RunConfig:
        """Its settings."""
        return digits_config(
            updates=self.updates,
            objective=self.method,
            guidance=1.0,
            seed=self.seed,
            student_optim=student_lr(self.lr),
        )


def run(seed: int, folder: Path, updates: int = UPDATES) -> dict[str, Any]:
    """All methods: the sweep and the seeds ``seed``, ``seed + 1``, ..."""
    runs = folder / "coverage"
    runs.mkdir(parents=True, exist_ok=True)
    work = {method: operations(method) for method in METHODS}
    rows = []
    for method in METHODS:
        tried = {lr: result_of(Run(method, lr, seed, updates), runs) for lr in LEARNING_RATES}
        lr = min(tried, key=lambda lr: tried[lr][SELECTED_BY])
        for budget in BUDGETS:
            share = work["mfd"] / work[method] if budget == "work" else 1.0
            made = round(updates * share)
            results = [
                result_of(Run(method, lr, s, made), runs) for s in range(seed, seed + NUM_SEEDS)
            ]
            row: dict[str, Any] = {"budget": budget, "method": method, "lr": lr, "updates": made}
            for name in KEYS:
                row[name], row[f"{name}_std"] = mean_and_spread([one[name] for one in results])
            sweep = [{"lr": lr, **result} for lr, result in tried.items()]
            rows.append(row | {"results": results, "sweep": sweep})
    gflop = {method: count / 1e9 for method, count in work.items()}
    return {"num_samples": NUM_SAMPLES, "seeds": NUM_SEEDS, "gflop": gflop, "rows": rows}


def operations(method: str) -> float:
    """Floating-point operations of one cycle, mean of the first ``COUNTED``."""
    config = digits_config(updates=1, objective=method, guidance=1.0)
    task = config.task()
    distiller, next_cond = make_distiller(task.backbone(), config.distill), task.conditions()
    steps = COUNTED * distiller.cycle_length
    with FlopCounterMode(display=False) as counter:
        for n in range(steps):
            distiller.step(next_cond(n))
    return counter.get_total_flops() / COUNTED


def result_of(run: Run, folder: Path) -> dict[str, float]:
    """The numbers of one run: from its file, or trained now and written there."""
    path = folder / run.file
    if path.is_file():
        return json.loads(path.read_text())
    numbers = measured(distil(run.config())[0], NUM_SAMPLES)
    result = {key: numbers[key] for key in KEYS}
    write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def table(figures: dict[str, Any]) -> str:
    """The rows as Markdown: mean and standard deviation over the seeds, and the sweep behind lr."""
    titles = ("FD teacher", "FD data", "precision", "recall", "accuracy")
    lines = [
        f"| equal | method | updates | lr | {' | '.join(titles)} | FD data in the sweep |",
        "|---" * (5 + len(KEYS)) + "|",
    ]
    for row in figures["rows"]:
        cells = [f"{row[key]:.3g} ({row[f'{key}_std']:.2g})" for key in KEYS]
        tried = [f"{one['lr']:g}: {one[SELECTED_BY]:.3g}" for one in row["sweep"]]
        head = [row["budget"], row["method"], row["updates"], f"{row['lr']:g}"]
        lines.append(f"| {' | '.join(map(str, [*head, *cells, ', '.join(tried)]))} |")
    return "\n".join(lines)


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(columns=4, title="One step, w = 1; whiskers are one standard deviation")
    panels = [(budget, key) for budget in BUDGETS for key in (SELECTED_BY, "recall")]
    for axis, (budget, key) in zip(figure.axes, panels, strict=True):
        rows = [row for row in figures["rows"] if row["budget"] == budget]
        title = {"recall": "recall"}.get(key, "Frechet distance to the data")
        names, spread = [row["method"] for row in rows], [row[f"{key}_std"] for row in rows]
        bars(axis, names, [row[key] for row in rows], spread, f"equal {budget}: {title}")
        highest = max(row[key] + row[f"{key}_std"] for row in figures["rows"])
        axis.set_xlim(0, 1.05 * highest)
    figure.save(path)


def judge(figures: dict[str, Any]) -> Verdict:
    holds, parts = True, []
    for budget in BUDGETS:
        rows = {row["method"]: row for row in figures["rows"] if row["budget"] == budget}
        nearest = min(rows.values(), key=lambda row: row["frechet_to_data"])
        widest = max(rows.values(), key=lambda row: row["recall"])
        holds &= nearest["method"] == widest["method"] == "mfd"
        numbers = ", ".join(
            f"{name} {row['frechet_to_data']:.1f} (sd {row['frechet_to_data_std']:.1f}) and "
            f"{row['recall']:.3f} (sd {row['recall_std']:.3f})"
            for name, row in rows.items()
        )
        parts.append(f"equal {budget}: {numbers}")
    return Verdict.of(
        holds,
        f"Frechet distance to the data and recall, {figures['seeds']} seeds; {'; '.join(parts)}",
    )
