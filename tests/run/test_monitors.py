"""What a run says about its health: right numbers, no extra wait, and words one can act on."""

import re

import pytest
import torch
from no_sync import NoSync
from small_runs import make_distiller, next_cond

from mfd_fast.run import monitors
from mfd_fast.run.config import TrainConfig
from mfd_fast.run.loop import Progress, train
from mfd_fast.run.monitors import USUAL, Monitors, TooManySkippedUpdates

CALM = {
    "saturation": 0.0, "aux_lag": 0.1, "distance": 1.0, "aux_grad_norm": 1.0,
    "student_grad_norm": 1.0, "aux_loss_mean": 1.0, "aux_loss_std": 0.2,
    "student_loss_mean": -0.5, "student_loss_std": 0.1, "skipped_in_a_row": 0.0,
}  # fmt: skip


def make_monitors(aux_updates=2, student_updates=1):
    return Monitors(torch.device("cpu"), aux_updates=aux_updates, student_updates=student_updates)


def read(watch):
    return watch.columns({name: value.item() for name, value in watch.sums.items()})


def test_columns_are_the_statistics_of_the_updates():
    torch.manual_seed(0)
    watch, losses = make_monitors(aux_updates=3, student_updates=2), torch.rand(20).double()
    for n, loss in enumerate(losses):
        role = "aux" if n % 5 < 3 else "student"
        watch.observe(n, role, {f"{role}_loss": loss})
    row, parts = read(watch), losses.view(4, 5)
    for name, values in (("aux_loss", parts[:, :3]), ("student_loss", parts[:, 3:])):
        assert row[f"{name}_mean"] == pytest.approx(values.mean().item(), rel=1e-12)
        std = values.std(correction=0).item()
        assert row[f"{name}_std"] == pytest.approx(std, rel=1e-9)
    lag = parts[:, 0].sum() / parts[:, 2].sum() - 1
    assert row["aux_lag"] == pytest.approx(lag.item(), rel=1e-12)
    assert read(watch) == {}  # the sums started again


def test_lag_needs_two_auxiliary_updates():
    watch = make_monitors(aux_updates=1)
    watch.observe(0, "aux", {"aux_loss": torch.tensor(1.0)})
    assert "aux_lag" not in read(watch)


@pytest.mark.parametrize(
    ("samples", "has_lag"), [("new", True), ("cycle", True), ("student", False)]
)
def test_lag_needs_samples_of_the_student_that_moved(samples, has_lag):
    monitors = Progress(make_distiller(aux_samples=samples)).monitors
    for n in range(2):
        monitors.observe(n, "aux", {"aux_loss": torch.tensor(1.0)})
    assert ("aux_lag" in read(monitors)) == (samples != "student")


def test_observing_waits_for_nothing():
    watch, metrics = make_monitors(), {"aux_loss": torch.tensor(2.0)}
    with NoSync():
        watch.observe(0, "aux", metrics)


OUT_OF_RANGE = {
    "saturation": ({"saturation": 0.2}, "20% of the samples.*lower distill.student_optim.lr"),
    "aux_lag": ({"aux_lag": 0.8}, "auxiliary's loss is 80% above.*raise distill.aux_updates"),
    "distance": ({"distance": 30.0}, "distance is 30, usual is 1: .*--resume PATH"),
    "aux_grad_norm": ({"aux_grad_norm": 20.0}, "the aux's gradient norm is 20, usual is 1"),
    "student_grad_norm": ({"student_grad_norm": 20.0}, "the student's gradient norm is 20"),
    "aux_loss_std": ({"aux_loss_std": 9.0}, "aux_loss scatters by 9 .*usual is 0.2: lower the"),
    "student_loss_std": ({"student_loss_std": 9.0}, "student_loss scatters by 9 .*usual is 0.1"),
}


def test_every_guard_is_tested():
    assert {"saturation", "aux_lag", *USUAL} == set(OUT_OF_RANGE)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_warning_when_a_monitor_leaves_its_range_and_only_then(name):
    change, sentence = OUT_OF_RANGE[name]
    watch = make_monitors()
    assert [watch.warnings(CALM) for _ in range(monitors.ROWS_BEFORE_WARNINGS)] == [[]] * 5
    (said,) = watch.warnings(CALM | change)
    assert re.search(sentence, said), said
    assert watch.warnings(CALM | change) == []  # said once
    assert watch.warnings(CALM) == []
    assert len(watch.warnings(CALM | change)) == 1  # it left its range again


def test_nothing_is_said_before_it_is_known_what_is_usual():
    watch = make_monitors()
    assert watch.warnings({**CALM, "saturation": 0.9}) == []


def test_a_row_of_another_objective_may_lack_columns():
    watch = make_monitors()
    for _ in range(10):
        assert watch.warnings({"update": 1, "student_loss": 1.0}) == []


def test_monitors_continue_where_they_were():
    one, two = make_monitors(), make_monitors()
    for n, loss in enumerate(torch.rand(7)):
        role = "aux" if n % 3 < 2 else "student"
        one.observe(n, role, {f"{role}_loss": loss})
        one.warnings(CALM | {"distance": float(loss)})
    two.load_state_dict(one.live_state())
    assert one.warnings(CALM | {"distance": 99.0}) == two.warnings(CALM | {"distance": 99.0}) != []
    assert read(one) == read(two)


def poisoned(first, last):
    """Conditions that are not finite from update ``first`` to ``last``."""

    def cond(n):
        return torch.full((8, 1), float("nan")) if first <= n <= last else next_cond(n)

    return cond


def test_a_run_that_only_skips_is_stopped_with_advice():
    config = TrainConfig(updates=100, log_every=1, max_skipped_in_a_row=4)
    distiller = make_distiller()
    with pytest.raises(
        TooManySkippedUpdates, match=r"the last 4 updates of a role had gradients .*loss_scale"
    ):
        train(distiller, poisoned(6, 10**6), config)
    assert distiller.num_updates == {"aux": 8, "student": 4}  # read after every student update
    parameters = distiller.backbone.parameters_of("student")
    assert all(torch.isfinite(p).all() for p in parameters)


def test_a_few_skipped_steps_are_counted_and_forgotten():
    config = TrainConfig(updates=8, log_every=1, max_skipped_in_a_row=4)
    rows = train(make_distiller(), poisoned(6, 9), config)
    assert [row["skipped"] for row in rows] == [0, 0, 3, 4, 4, 4, 4, 4]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 0, 2, 0, 0, 0, 0, 0]


def test_a_row_tells_everything_that_is_watched():
    (row,) = train(make_distiller(), next_cond, TrainConfig(updates=1))
    watched = {"distance", "aux_grad_norm", "student_grad_norm", "aux_lag", "saturation",
               "aux_loss_std", "student_loss_std"}  # fmt: skip
    assert watched <= set(row)


def test_saturation_is_the_share_beyond_the_bound():
    distiller = make_distiller(sample_bound=1e-6)
    assert distiller.student_step(next_cond(0))["saturation"] == 1.0
    assert make_distiller(sample_bound=1e6).student_step(next_cond(0))["saturation"] == 0.0


def test_warnings_reach_the_run(monkeypatch):
    told = []
    monkeypatch.setattr(Monitors, "warnings", lambda self, row: [f"row {row['update']}"])
    distiller = make_distiller()
    progress = Progress(distiller)
    train(distiller, next_cond, TrainConfig(updates=2, log_every=1), progress=progress,
          warn=told.append)  # fmt: skip
    assert told == ["row 1", "row 2"]
