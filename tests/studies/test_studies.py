"""The studies: their statistics with fixed seeds, verdicts, files and the command."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from gaussian import GaussianNetwork
from torch import Generator

from mfd_fast.baselines.config import ObjectiveName
from mfd_fast.flow.integrate import mean_velocity
from mfd_fast.flow.times import sample_time_pairs
from mfd_fast.run.maker import make_distiller
from studies import (
    STUDIES,
    coverage_all,
    distance,
    jacobian,
    loss_spread,
    no_auxiliary,
    report,
    step_size,
    toy_field,
)
from studies import __main__ as command
from studies import coverage as coverage_study
from studies.digits_runs import digits_config
from studies.toy_runs import energy_distance
from studies.toys import mixture_velocity
from studies.verdict import Verdict

pytest.importorskip("matplotlib")


def test_variance_of_the_mean_velocity_falls_as_one_over_n():
    """Slope of log Var against log N within 0.1 of -1 (paper C.3, D.2)."""
    x, generator = toy_field.grid(), Generator().manual_seed(0)
    variances = [toy_field.variance_of_mean(x, n, generator, draws=20) for n in toy_field.STEPS]
    assert abs(toy_field.log_slope(toy_field.STEPS, variances) + 1) < 0.1


def test_the_rounded_solver_takes_the_projects_steps():
    """The literal loop and ``mean_velocity`` take the same steps; bf16 loses the small ones."""
    generator = Generator().manual_seed(0)
    t, r = sample_time_pairs(64, min_interval=0.1, generator=generator)
    x, h = torch.randn(64, 2, generator=generator), 0.01
    ours = mean_velocity(mixture_velocity, x, t, r, step_size=h)
    errors = {
        dtype: (step_size.rounded_mean_velocity(mixture_velocity, x, t, r, h, dtype) - ours).norm()
        for dtype in (torch.float32, torch.bfloat16)
    }
    # The last step is the short one there, all are equal here: a difference of order h.
    assert errors[torch.float32] < 0.1 * ours.norm()
    assert errors[torch.bfloat16] > errors[torch.float32]
    smallest = step_size.rounded_mean_velocity(mixture_velocity, x, t, r, 1e-3, torch.bfloat16)
    assert (smallest - ours).norm() > errors[torch.bfloat16]


def test_the_exact_mean_velocity_is_that_of_a_fine_solve():
    generator = Generator().manual_seed(0)
    t, r = sample_time_pairs(16, min_interval=0.3, generator=generator)
    x = torch.randn(16, 2, generator=generator)
    exact = step_size.exact_velocity(x, t, r)
    coarse, fine = (
        (mean_velocity(mixture_velocity, x.double(), t, r, step_size=h) - exact).norm()
        for h in (0.02, 0.01)
    )
    assert fine < coarse < 3 * fine  # Euler: half the step, half the error


@pytest.fixture(scope="module")
def started():
    """An untrained digits distiller and its task."""
    config = digits_config(updates=1, batch_size=8)
    task = config.task()
    return make_distiller(task.backbone(), config.distill), task


def test_a_frozen_loss_is_equation_19_of_its_sample(started, monkeypatch):
    """Taken from the gradient of a batch, against the mean of (u_T - u_A) x_t of one sample."""
    distiller, task = started
    monkeypatch.setattr(loss_spread, "LOSSES", 8)
    monkeypatch.setattr(loss_spread, "BATCH", 8)
    losses, _ = loss_spread.frozen_losses(distiller, task)
    generator = Generator().manual_seed(loss_spread.FIRST_PROBE)
    backbone, objective = distiller.backbone, distiller.objective
    prepared = backbone.prepare(task.conditions()(loss_spread.FIRST_PROBE))
    z, noise = torch.randn(2, 8, *backbone.sample_shape, generator=generator)
    with torch.no_grad():
        x0 = z - backbone.student(z, torch.ones(8), prepared.cond)
    table = objective.draw(8, generator)
    x_t = objective.noised(x0, noise, table.times[0])
    delta = jacobian.mean_flow_difference(distiller, prepared, x_t, table).detach()
    expected = (delta * x_t).flatten(1).mean(1)
    bound = 1e3 * torch.finfo(torch.float32).eps * expected.abs().max()  # of two solves
    assert (torch.tensor(losses) - expected).abs().max() <= bound


def test_slope_of_an_exact_power_law():
    steps = (1, 2, 8, 32)
    assert toy_field.log_slope(steps, [3.0 / n**2 for n in steps]) == pytest.approx(-2.0)


def test_without_an_auxiliary_the_variance_falls_below_one_percent():
    """A student with the teacher's spread collapses (paper C.4)."""
    teacher = GaussianNetwork(dim=2)

    class Spread(torch.nn.Module):
        """One step from noise z: shift + scale z, at first the teacher's own distribution."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((2,), 0.5))
            self.shift = torch.nn.Parameter(torch.full((2,), 0.3))

        def forward(self, x, t, cond):
            return x - (self.shift + self.scale * x)

    variances = no_auxiliary.collapse(
        lambda x, t, cond: teacher(x, t, 0.0), Spread(), seed=0, updates=200, lr=0.02
    )
    share = [variance / (2 * 0.5**2) for variance in variances]
    assert 0.9 < share[0] < 1.1 and share[-1] < 0.01


def test_energy_distance_is_zero_for_one_law_and_grows_with_a_shift():
    """Points of a line: 2 E|a - b| - E|a - a'| - E|b - b'| by hand; and the same law."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert energy_distance(a, b) == pytest.approx(2 * (1 + 5 + 1 + 3) / 4 - 2 - 4)
    draws = torch.randn(3, 2000, 2, generator=Generator().manual_seed(0))
    same, shifted = energy_distance(draws[0], draws[1]), energy_distance(draws[0], draws[2] + 1)
    assert abs(same) < 0.01 < 0.5 < shifted


def coverage_figures(mfd_distance, mfd_recall):
    """Every number is 1 but those of mfd at equal time."""
    row = {"updates": 10, "evaluations": 60.0, "lr": 1e-3, "selected_by": "recall"}
    row |= {"sweep": [{"lr": 1e-3, "recall": 0.5}]}
    row |= {f"{key}{end}": 1.0 for key in coverage_study.KEYS for end in ("", "_std")}
    budgets, methods = coverage_study.BUDGETS, coverage_study.METHODS
    rows = [{"budget": b, "method": m, **row} for b in budgets for m in methods]
    rows[0] |= {"frechet_to_data": 0.5, "recall": 2.0}
    rows[len(methods)] |= {"frechet_to_data": mfd_distance, "recall": mfd_recall}
    return {"rows": rows}


@pytest.mark.parametrize(
    ("values", "word"),
    [((0.5, 2.0), "confirmed"), ((2.0, 2.0), "not confirmed"), ((0.5, 0.5), "not confirmed")],
)
def test_coverage_needs_the_best_distance_and_the_best_recall(values, word, tmp_path):
    figures = coverage_figures(*values)
    assert coverage_study.judge(figures).word == word
    row = f"| time | mfd | 10 | 60 | 0.001 | 1 (1) | {values[0]:.3g} (1) |"
    assert row in coverage_study.table(figures)
    coverage_study.draw(figures, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_coverage_sweeps_every_method_alike_and_resumes(tmp_path, monkeypatch):
    """Each method and budget: every rate with one seed, the best of them with all; at equal time
    as many evaluations as mfd, to one cycle; the study of all methods repeats no run.
    """
    trained = []

    def train(config):
        trained.append((config.distill.objective, config.train.updates, config.distill.guidance))
        return config, [], 1.0

    def measure(config, num_samples):
        return dict.fromkeys(coverage_study.KEYS, config.distill.student_optim.lr)

    cost = dict(zip(get_args(ObjectiveName), range(20, 2, -2), strict=True))
    monkeypatch.setattr(coverage_study, "distil", train)
    monkeypatch.setattr(coverage_study, "measured", measure)
    monkeypatch.setattr(coverage_study, "evaluations", cost.get)
    rows = coverage_study.run(0, tmp_path)["rows"]
    per_method = len(coverage_study.LEARNING_RATES) + coverage_study.NUM_SEEDS - 1
    others = len(coverage_study.METHODS) - 1
    assert len(trained) == per_method * (1 + 2 * others)  # mfd's are the same at both
    best = min(coverage_study.LEARNING_RATES)
    assert all(row["lr"] == row["recall"] == best for row in rows)
    spent = rows[0]["evaluations"]
    equal = [row for row in rows if row["budget"] == "time"]
    assert all(abs(row["evaluations"] - spent) < cost[row["method"]] for row in equal)
    assert {guidance for _, _, guidance in trained} == {1.0}
    done = len(trained)
    assert coverage_study.run(0, tmp_path)["rows"] == rows and len(trained) == done
    everything = coverage_all.run(0, tmp_path)["rows"]
    assert len(trained) == done + per_method * (len(everything) - others - 1)
    assert all(row in everything for row in equal)


def test_evaluations_of_a_consistency_cycle():
    """A teacher's step, the target, the student forward and twice backward: 5 forwards."""
    assert coverage_study.evaluations("cd") == pytest.approx(5, rel=0.01)


def test_the_readme_says_how_many_claims_hold():
    root = Path(report.__file__).parents[1]
    tested, held = re.search(
        r"Of (\d+) claims of the paper that are tested, (\d+) hold here",
        (root / "docs/studies.md").read_text(),
    ).groups()
    said = " ".join((root / "README.md").read_text().split())
    assert f"{held} of {tested} tested claims of the paper hold" in said


def test_distance_summary_is_start_peak_and_end():
    curve = [0.0, *[1.0] * 10, *[3.0] * 10, *[2.0] * 10]
    assert distance.summary(curve) == (0.0, 3.0, 2.0)


class OneNumber:
    """A study of no duration."""

    __doc__ = "What is looked at."
    CLAIM = "it is positive"
    RULE = "the number is above 0"

    @staticmethod
    def run(seed, folder):
        return {"number": seed + 1}

    @staticmethod
    def draw(figures, path):
        path.write_bytes(b"picture")

    @staticmethod
    def judge(figures):
        return Verdict.of(figures["number"] > 0, f"the number is {figures['number']}")


def test_study_all_runs_what_is_missing_and_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "STUDIES", {"one": "one", "two": "two"})
    monkeypatch.setattr(report, "module_of", lambda name: OneNumber)
    page = tmp_path / "docs" / "studies.md"
    words = ["all", "--out", str(tmp_path / "results"), "--report", str(page)]
    command.main(words)
    text = page.read_text()
    assert "| [one](#one) | it is positive | the number is above 0 | **confirmed** |" in text
    assert "Of 2 claims of the paper that are tested, 2 hold here." in text
    assert "Here: **confirmed**. The number is 1." in text
    assert "![two](../results/two.png)" in text and "not testable here" in text
    document = json.loads((tmp_path / "results" / "one.json").read_text())
    assert document["study"] == "one" and document["seed"] == 0 and "commit" in document
    command.main(words)  # nothing is run again
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: toy-field|"),
        (["cots"], "invalid choice: 'cots' .*cost"),
        (["cost", "--report", "x.md"], "--report belongs to python -m studies all"),
        (["cost", "--sead", "1"], "unrecognized arguments: --sead"),
    ],
)
def test_a_wrong_request_is_one_sentence(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and not list(tmp_path.iterdir())


def test_a_study_that_was_run_is_not_overwritten(tmp_path):
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cost\.json exists; move it away, or choose another"):
        report.run_study("cost", tmp_path)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_parts(name):
    module = report.module_of(name)
    assert all(callable(getattr(module, part)) for part in ("run", "draw", "judge"))
    assert module.CLAIM and module.RULE and module.__doc__
