"""bench/cycles.py: what ``estimate`` and ``profile`` show, without a checkpoint."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.utils._pytree import tree_leaves

from bench.predict import cycles
from bench.results import record
from bench.running import Options
from mfd_fast.cost.phases import Phase, Span
from mfd_fast.cost.shapes import shapes_of
from mfd_fast.models import preset


@pytest.mark.parametrize("name", ["sana-tiny", "digits"])
def test_what_runs_is_what_is_predicted(name):
    config = preset(name)
    config = replace(config, train=replace(config.train, device="cpu"))
    known, (distiller, next_cond) = shapes_of(config), cycles.ready(config)
    assert distiller.backbone.sample_shape == known.backbone.sample_shape
    assert distiller.backbone.device.type == "cpu"
    shapes = [x.shape for x in tree_leaves(known.cond(config.train.batch_size))]
    assert [x.shape for x in tree_leaves(next_cond(0))] == shapes
    for role in ("aux", "student"):
        ours, theirs = (b.parameters_of(role) for b in (distiller.backbone, known.backbone))
        assert [p.shape for p in ours] == [p.shape for p in theirs]


def result_of(tmp_path, what: str, name: str) -> dict:
    """The result that a benchmark leaves."""
    options = Options(repeats=1, out=tmp_path)
    record(cycles.benchmark(options, what, name), options, tmp_path / "result.json")
    return json.loads((tmp_path / "result.json").read_text())


def test_an_estimate_is_set_beside_what_was_measured(monkeypatch, tmp_path):
    phases = {"aux/forward": Phase(Span(0.1, 0.1), 0.2)}
    run = SimpleNamespace(phases=phases, cycle_seconds=Span(0.3, 0.3))
    monkeypatch.setattr(cycles, "estimate", lambda *_: run)
    monkeypatch.setattr(cycles, "ready", lambda config: (None, None))
    taken = {"aux/forward": 0.1, "student/finish": 0.4}
    monkeypatch.setattr(cycles, "measured_phases", lambda *_, cycles: taken)
    monkeypatch.setattr(cycles, "text", lambda run: "")
    monkeypatch.setattr(cycles, "side_by_side", lambda run, taken: "")
    result = result_of(tmp_path, "estimate", "sana-tiny")
    assert result["op"] == "estimate" and result["config"]["preset"] == "sana-tiny"
    assert "measured" in result["config"]["rates"]
    assert [tuple(row.values()) for row in result["rows"]] == [
        ("aux/forward", 200.0, 100.0, 2.0),
        ("student/finish", 0.0, 400.0, 0.0),
        ("cycle", 300.0, 500.0, 0.6),
    ]


def test_a_profile_has_phases_and_their_families(tmp_path):
    result = result_of(tmp_path, "profile", "sana-tiny")
    assert (tmp_path / "trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"  # gzip
    assert [row["phase"].split("/")[0] for row in result["rows"]] == ["aux"] * 4 + ["student"] * 4
    assert all(row["ms"] > 0 and "product" in row["families_ms"]
               for row in result["rows"] if "optimizer" not in row["phase"])  # fmt: skip
    assert len(result["config"]["slowest"]) == cycles.SLOWEST and result["config"]["memory_mb"] > 0
