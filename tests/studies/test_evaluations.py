"""The evaluations study: its statistics and rule by hand, and the savings that are tried there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gaussian import GaussianNetwork
from torch import Generator

from mfd_fast import CopiedBackbone, DistillConfig
from mfd_fast.distill.objectives import MeanFlowDistillation, time_pairs
from mfd_fast.flow.solvers import plan
from mfd_fast.models import preset
from mfd_fast.run.config import with_fast
from mfd_fast.testing.numerics import assert_as_accurate
from studies import evaluation_page, evaluations, evaluations_sana, evaluations_toys
from studies.savings import ByNeed, SeveralEnds, TwoNodes, smaller_times

CONFIG = DistillConfig(guidance=1.0, step_size=0.05, solver="ab2")


def test_smaller_times_have_the_law_of_the_smaller_of_two():
    """Moments of min(a, b) and its correlation with max(a, b), by two ways to draw the pair."""
    size = 200_000
    t, r = time_pairs(size, CONFIG, Generator().manual_seed(0), 0.0)
    (other,) = smaller_times(t, 1, 0.0, 1.0, Generator().manual_seed(1))
    assert (other <= t).all()
    for of in (lambda r: r, lambda r: r.square(), lambda r: r * t):
        a, b = of(r), of(other)
        error = (a.var() / size + b.var() / size).sqrt()
        assert (a.mean() - b.mean()).abs() < 4 * error


def gradient(make, ends, dtype=torch.float32, step_size=0.1, solver="euler"):
    """d loss / d x_0 of an objective between two Gaussians, for intervals [end, .8]."""
    teacher, aux = (GaussianNetwork(*law, dim=2).to(dtype) for law in ((0.3, 0.5), (0.0, 1.0)))
    backbone = CopiedBackbone(teacher, aux, sample_shape=(2,))
    objective = make(DistillConfig(guidance=1.0, step_size=step_size, solver=solver))
    t, *ends = (torch.full((8,), time, dtype=dtype) for time in (0.8, *ends))
    objective.t, objective.r, objective.ends = t, ends[-1], torch.stack(ends)
    x0, noise = torch.randn(2, 8, 2, generator=Generator().manual_seed(1)).to(dtype).unbind()
    x0.requires_grad_()
    table = plan(t, ends[-1], step_size=step_size, solver=solver)
    prepared = backbone.prepare(torch.zeros(8, 1))
    loss, _ = objective.student_loss(backbone, prepared, x0, noise, table)
    return torch.autograd.grad(loss, x0)[0]


def mean_flow(ends, dtype, **solver):
    """The mean of the gradients of Mean Flow Distillation over single intervals."""
    parts = [gradient(MeanFlowDistillation, [end], dtype, **solver) for end in ends]
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize(
    ("make", "ends", "solver"),
    [
        (SeveralEnds, (0.3,), {"solver": "ab2"}),
        (SeveralEnds, (0.6, 0.5, 0.2), {}),  # Euler: the nodes of the longest are those of all
        (TwoNodes, (0.3,), {"solver": "ab2", "step_size": 0.25}),
    ],
)
def test_a_saving_has_the_gradient_of_its_intervals_one_by_one(make, ends, solver):
    actual, eager = gradient(make, ends, **solver), mean_flow(ends, torch.float32, **solver)
    assert_as_accurate(actual, eager, mean_flow(ends, torch.float64, **solver))


class Cycles:
    """A distiller whose auxiliary lags by ``lag`` after every update of the student."""

    def __init__(self, lag):
        self.lag, self.fresh = lag, True

    def aux_step(self, cond):
        loss, self.fresh = 1.0 + self.lag * self.fresh, False
        return {"aux_loss": torch.tensor(loss)}

    def student_step(self, cond):
        self.fresh = True


@pytest.mark.parametrize(("lag", "updates"), [(0.0, 2), (0.01, 2), (0.2, 10)])
def test_updates_by_need_go_down_to_two_or_up_to_ten(lag, updates):
    need = ByNeed(5)
    for _ in range(100):
        need.cycle(Cycles(lag), None)
    assert need.updates == updates and need.cycles == 100


def test_the_interval_is_students_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, standard error sqrt(.5), t = 2.776."""
    mean, low, high = evaluations.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * 0.5**0.5
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))


def row(share, **differences):
    runs = [{"seed": 0, "commit": "c", "curve": [
        {"updates": n, "seconds": 1.0, "FD": 4.0 - n / 100, "recall": 0.5, "to teacher": 0.1}
        for n in (100, 200)
    ]}]  # fmt: skip
    metrics = ("FD", "recall", "to teacher")
    return {
        "evaluations": 10 * share, "share": share, "runs": runs, "phases": {},
        "quality": dict.fromkeys(metrics, 0.5),
        "difference": {name: differences.get(name, [0.0, -1.0, 1.0]) for name in metrics},
    }  # fmt: skip


def figures(**named):
    """All places with the same rows, and the preset."""
    return {"places": {place: {"preset": row(1.0)} | named for place in evaluations.DECIDES}}


WORSE, LESS, BETTER = [0.2, 0.1, 0.3], [-0.2, -0.3, -0.1], [-0.2, -0.3, -0.1]


@pytest.mark.parametrize(
    ("rows", "winner"),
    [
        ({"a": row(0.4), "b": row(0.3), "c": row(0.6)}, "b"),
        ({"a": row(0.4), "b": row(0.3, FD=WORSE), "c": row(0.2, recall=LESS)}, "a"),
        ({"a": row(0.6), "b": row(0.7), "c": row(0.55)}, None),
        ({"a": row(0.4, FD=BETTER), "b": row(0.3, recall=LESS)}, "a"),
    ],
)
def test_the_fewest_evaluations_that_hold_win(rows, winner, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluations, "COMBINED", rows)
    found = figures(**rows)
    assert evaluations.winner(found["places"]) == winner
    assert evaluations.judge(found).word == ("confirmed" if winner else "not confirmed")
    evaluations.draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_saving_pays_if_it_holds_on_both_toys(tmp_path):
    good, bad = row(0.5), row(0.5, **{"to teacher": WORSE})
    rows = [{"preset": row(1.0), "a": good, "b": of, "c": row(1.0)} for of in (good, bad, bad, bad)]
    found = dict(zip(evaluations_toys.SETTINGS, rows, strict=True))
    assert evaluations_toys.judge(found) == ("confirmed", "paying on both toys: a")
    evaluations_toys.draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_fast_is_the_solver_alone():
    base = preset("digits")
    assert with_fast(base).distill == replace(base.distill, **evaluations.AB2)


def test_a_quality_is_reached_between_two_points():
    """FD 3 after 100 updates of 10 evaluations, 2 after 200: 2.5 after 1,500."""
    assert evaluations.reached(row(1.0), "FD", 2.5) == pytest.approx(1500.0)
    assert evaluations.reached(row(1.0), "FD", 3.5) == pytest.approx(1000.0)
    assert evaluations.reached(row(1.0), "FD", 1.0) is None


def test_a_table_names_worse_and_paying_settings():
    rows = {"preset": row(1.0), "a": row(0.4), "b": row(0.3, FD=WORSE), "c": row(1.0)}
    table = evaluation_page.table(rows, ("FD",), ("recall",)).splitlines()
    for line, word in zip(table[3:], ("pays", "worse", "holds"), strict=True):
        assert f"| {word} |" in line


@pytest.mark.parametrize(
    ("toys", "sentence"),
    [((BETTER, BETTER), "**a** wins"), ((BETTER, WORSE), "a is worse on two_moons")],
)
def test_a_winner_holds_on_the_digits_and_on_both_toys(toys, sentence, monkeypatch):
    monkeypatch.setattr(evaluations, "COMBINED", ["a"])
    found = {
        place: {"a": row(0.4, **{"to teacher": of})}
        for place, of in zip(evaluations.TOYS, toys, strict=True)
    }
    digits = figures(a=row(0.4))["places"]
    assert sentence in evaluation_page.winner(digits, found)
    assert "no setting wins" in evaluation_page.winner(figures(a=row(0.6))["places"], found)


def test_the_page_asks_for_what_was_not_run(tmp_path):
    with pytest.raises(ValueError, match="run python -m studies evaluations-toys --out"):
        evaluation_page.figures_of(tmp_path, "toys")


def test_a_small_sana_learns_from_prompts_and_is_distilled(tmp_path, monkeypatch):
    sizes = {"updates": 1, "batch_size": 2, "ema_decay": 0.5}
    monkeypatch.setattr(evaluations_sana, "TEACHER", replace(evaluations_sana.TEACHER, **sizes))
    few = {"BATCH": 2, "UPDATES": 2, "TEACHER_STEPS": 1, "NUM_SAMPLES": 20}
    for name, value in few.items():
        monkeypatch.setattr(evaluations_sana, name, value)
    config = evaluations_sana.config_of(0, aux_updates=1, step_size=0.5)
    (*_, end) = evaluations_sana.distilled(config, tmp_path)["curve"]
    before = evaluations_sana.quality_of(tmp_path, evaluations_sana.started(config, tmp_path))
    assert end["updates"] == 2 and end["FD"] != before["FD"]


def test_the_page_is_the_committed_result():
    root = Path(__file__).parents[2]
    link = "bench/results/studies/evaluations.json"
    path = root / link
    page = evaluations.page(json.loads(path.read_text()), f"../{link}", path.parent)
    assert (root / "docs/evaluations.md").read_text() == page
