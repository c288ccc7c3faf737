"""Metrics sent elsewhere: what arrives there is what the trainer logged."""

import sys
import types

import pytest

from mfd_fast.run.trackers import check_tracker, make_tracker

ROWS = [{"update": n, "distance": 1.0 / n, "skipped": 0} for n in (10, 20)]


def test_none_is_no_callback(tmp_path):
    assert make_tracker("none", tmp_path, {}) == []


def test_tensorboard_gets_every_scalar_at_its_update(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (track,) = make_tracker("tensorboard", tmp_path, {"distill": {"seed": 1}})
    for row in ROWS:
        track(row)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["distance", "skipped"]
    got = [(event.step, event.value) for event in events.Scalars("distance")]
    assert got == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]


def test_wandb_gets_the_rows_and_the_config(tmp_path, monkeypatch):
    calls, logged = {}, []

    def init(**options):
        calls.update(options)
        return types.SimpleNamespace(log=lambda row, step: logged.append((step, row)))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (track,) = make_tracker("wandb", tmp_path / "my-run", {"distill": {"seed": 1}})
    for row in ROWS:
        track(row)
    assert calls["name"] == calls["id"] == "my-run" and calls["config"]["distill"]["seed"] == 1
    assert logged == [(10, ROWS[0]), (20, ROWS[1])]


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_missing_package_is_named(kind, monkeypatch):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {kind}"):
        check_tracker(kind)
