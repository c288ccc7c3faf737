"""Coverage (paper D.1, Table 6): its methods as the paper compares them, without guidance (w = 1),
from one teacher and with one network, one step.

At equal updates of the student, and at equal time: as many updates as make the floating-point
operations of mfd's run, forward and backward, of both roles and the integrations.  They are counted
on the cycle that is run (``mfd_fast.cost``) and said in forward evaluations of a sample; seconds
would differ from machine to machine, these are the same to the digit.

For every method and either budget two learning rates of the student are tried with one seed; the
better one, by the Frechet distance to what the method learns from (``selected_by``), is run with
two more seeds; if that distance then spreads by more than its mean, the other rate is taken.  Runs
that are done are not repeated.  All students start as the teacher, those of meanflow and imm too,
which the paper trains from scratch: that favours them.  meanflow has its authors' settings for
CIFAR-10, the others the preset's; runs are short, so weights are averaged over 20 updates, not 50.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mfd_fast.baselines.config import DERIVATIVE_SPAN, MeanFlowSettings
from mfd_fast.cost.plans import cycle_of
from mfd_fast.cost.trace import OUTSIDE, Trace
from mfd_fast.files.whole import write_text
from mfd_fast.run.config import RunConfig
from studies.digits_runs import digits_config, distil, mean_and_spread, measured, student_lr
from studies.plots import Figure, bars
from studies.verdict import Verdict

CLAIM = (
    "MFD achieves the best FID and recall among all single-step methods (D.1, Table 6, CIFAR-10: "
    "MFD 22.65, .212; MeanFlow 24.36, .207; IMM 26.02, .188; DMD2 26.47, .173; Diff-Instruct, here "
    "vsd, 29.10, .190)"
)
RULE = (
    "at equal updates and at equal time mfd has the smallest mean Frechet distance to the data and "
    "the largest mean recall of the five methods"
)
METHODS = ("mfd", "meanflow", "imm", "dmd2", "vsd")
BUDGETS = ("updates", "time")
FROM_DATA = ("meanflow", "imm")
LEARNING_RATES = (3e-4, 1e-3)
NUM_SEEDS = 3
UPDATES = 60  # at equal time: of mfd
BATCH = 16
EMA_DECAY = 0.95
NUM_SAMPLES = 1000
CIFAR10 = MeanFlowSettings(power=0.75, equal_fraction=0.25, derivative_span=DERIVATIVE_SPAN)
OVERRIDES: dict[str, dict[str, Any]] = {
    "meanflow": {"meanflow": CIFAR10, "time_mean": -2.0, "time_std": 2.0},
    "cd": {"step_size": 0.25},
}
KEYS = ("frechet_to_teacher50", "frechet_to_data", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Run:
    """One training of the study."""

    method: str
    updates: int
    lr: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.method}_updates{self.updates}_lr{self.lr:g}_seed{self.seed}.json"

    def config(self) -> RunConfig:
        """Its settings."""
        return digits_config(
            updates=self.updates,
            batch_size=BATCH,
            objective=self.method,
            guidance=1.0,
            seed=self.seed,
            ema_decay=EMA_DECAY,
            student_optim=student_lr(self.lr),
            **OVERRIDES.get(self.method, {}),
        )


def run(seed: int, folder: Path) -> dict[str, Any]:
    return compared(METHODS, BUDGETS, seed, folder)


def compared(
    methods: Sequence[str], budgets: Sequence[str], seed: int, folder: Path
) -> dict[str, Any]:
    """The sweep of every method and the seeds ``seed``, ``seed + 1``, ... of each budget."""
    runs = folder / "coverage"
    runs.mkdir(parents=True, exist_ok=True)
    cycles = {method: evaluations(method) for method in methods}
    rows = []
    for budget in budgets:
        for method in methods:
            share = cycles["mfd"] / cycles[method] if budget == "time" else 1.0
            updates = round(UPDATES * share)
            row = {"budget": budget, "method": method, "updates": updates}
            row["evaluations"] = updates * cycles[method]
            rows.append(row | best_rate(method, updates, range(seed, seed + NUM_SEEDS), runs))
    return {"batch": BATCH, "num_samples": NUM_SAMPLES, "seeds": NUM_SEEDS, "rows": rows}


def evaluations(method: str) -> float:
    """Operations of a cycle in those of one forward evaluation; both for a sample."""
    config = Run(method, UPDATES, LEARNING_RATES[0], 0).config()
    model = config.shapes()
    x = torch.empty(BATCH, *model.backbone.sample_shape, device="meta")
    with torch.no_grad(), Trace() as trace:
        model.backbone.teacher(x, torch.empty(BATCH, device="meta"), model.cond(BATCH))
    return cycle_of(config, BATCH).total.flops / trace.work[OUTSIDE].flops


def best_rate(method: str, updates: int, seeds: range, folder: Path) -> dict[str, Any]:
    """The better learning rate: means and standard deviations over the seeds, and the sweep."""
    key = "frechet_to_data" if method in FROM_DATA else "frechet_to_teacher50"
    tried = {lr: result_of(Run(method, updates, lr, seeds[0]), folder) for lr in LEARNING_RATES}
    for lr in sorted(tried, key=lambda lr: tried[lr][key]):
        results = [result_of(Run(method, updates, lr, seed), folder) for seed in seeds]
        mean, spread = mean_and_spread([result[key] for result in results])
        if spread < mean:
            break
    row: dict[str, Any] = {"lr": lr, "selected_by": key, "results": results}
    for name in KEYS:
        row[name], row[f"{name}_std"] = mean_and_spread([result[name] for result in results])
    return row | {"sweep": [{"lr": lr, **result} for lr, result in tried.items()]}


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
        f"| equal | method | updates | evaluations | lr | {' | '.join(titles)} | FD of the sweep |",
        "|---" * (6 + len(KEYS)) + "|",
    ]
    for row in figures["rows"]:
        head = [row[key] for key in ("budget", "method", "updates")]
        head += [f"{row['evaluations']:.0f}", f"{row['lr']:g}"]
        cells = [f"{row[key]:.3g} ({row[f'{key}_std']:.2g})" for key in KEYS]
        tried = [f"{one['lr']:g}: {one[row['selected_by']]:.3g}" for one in row["sweep"]]
        lines.append(f"| {' | '.join(map(str, [*head, *cells, ', '.join(tried)]))} |")
    return "\n".join(lines)


def draw(figures: dict[str, Any], path: Path) -> None:
    titles = {"frechet_to_data": "Frechet distance to the data", "recall": "recall"}
    budgets = list(dict.fromkeys(row["budget"] for row in figures["rows"]))
    figure = Figure(columns=2 * len(budgets), title="One step, w = 1; whiskers are one sd of seeds")
    panels = [(budget, key) for budget in budgets for key in titles]
    for axis, (budget, key) in zip(figure.axes, panels, strict=True):
        rows = [row for row in figures["rows"] if row["budget"] == budget]
        names, spread = [row["method"] for row in rows], [row[f"{key}_std"] for row in rows]
        bars(axis, names, [row[key] for row in rows], spread, f"equal {budget}: {titles[key]}")
        axis.set_xlim(0, 1.05 * max(row[key] + row[f"{key}_std"] for row in figures["rows"]))
    figure.save(path)


def is_best(name: str, rows: list[dict[str, Any]]) -> bool:
    """Whether a method has both the smallest distance to the data and the largest recall."""
    nearest = min(rows, key=lambda row: row["frechet_to_data"])
    widest = max(rows, key=lambda row: row["recall"])
    return nearest["method"] == widest["method"] == name


def numbers_of(figures: dict[str, Any], budget: str) -> str:
    """Distance and recall of every method, the nearest to the data first."""
    rows = [row for row in figures["rows"] if row["budget"] == budget]
    return f"equal {budget}: " + ", ".join(
        f"{row['method']} {row['frechet_to_data']:.2f} (sd {row['frechet_to_data_std']:.2f}) and "
        f"{row['recall']:.3f} (sd {row['recall_std']:.3f})"
        for row in sorted(rows, key=lambda row: row["frechet_to_data"])
    )


def judge(figures: dict[str, Any]) -> Verdict:
    parts = "; ".join(numbers_of(figures, budget) for budget in BUDGETS)
    holds = all(
        is_best("mfd", [row for row in figures["rows"] if row["budget"] == budget])
        for budget in BUDGETS
    )
    return Verdict.of(holds, f"Frechet distance to the data and recall; {parts}")
