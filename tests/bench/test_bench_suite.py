"""``python -m bench``: what it runs, what it compares with, the report."""

import json
import re
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as suite
from bench import results
from bench.pages.suite import table_of, write_page
from bench.results import columns_of, compare, time_of
from bench.running import Options

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
COMPARED = {"mfd_loss", *results.COLUMNS}


def committed(op: str) -> dict:
    """A committed result of an operator; one of those that a suite compares."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return next(result for result in found if result.get("op") == op)


def slowed(result: dict, factor: float) -> dict:
    """The same result with our rows so many times as slow."""
    columns = columns_of(result)
    for row in result["rows"]:
        if results.is_ours(row) or columns.is_rate:
            name, value = time_of(row, columns)
            row[name] = value / factor if columns.is_rate else value * factor
    return result


@pytest.mark.parametrize("op", sorted(COMPARED))
def test_every_kind_of_result_is_compared_by_its_own_columns(op):
    result = slowed(committed(op), 3.0)
    rows = compare(result)
    assert len(rows) == len(result["rows"])
    slower = [row for row in rows if row.is_ours or row.is_rate]
    assert slower and {round(row.ratio, 6) for row in slower} == {3.0}
    assert {row.ratio for row in rows} <= {row.ratio for row in slower} | {1.0}


@pytest.mark.parametrize("op", sorted(COMPARED))
def test_rows_of_a_committed_file_have_names_of_their_own(op):
    result = committed(op)
    names = [results.case_of(row, columns_of(result)) for row in result["rows"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("key", ["device", "threads"])
def test_another_machine_is_not_compared_with(key):
    result = committed("mfd_loss")
    result[key] = "another" if key == "device" else result[key] + 1
    assert compare(result) == []
    assert results.summary([result]).startswith("no committed result of this device")


@pytest.mark.parametrize("key", ["model", "interval", "step"])
def test_another_work_is_not_compared_with(key):
    result = committed("step")
    assert compare(result)
    result["config"][key] = "another"
    assert compare(result) == []


def test_the_newest_committed_result_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name, date, factor in (("a", "2026-02-01", 2.0), ("b", "2026-01-01", 1.0)):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(slowed(committed("mfd_loss"), factor) | {"date": date})
        )
    now = committed("mfd_loss")
    assert {row.ratio for row in compare(now) if row.is_ours} == {0.5}


def test_ours_and_the_others_are_summed_up_apart():
    assert re.search(
        r"^\d+ rows .*: this project's 3\.00, others' 1\.00 ",
        results.summary([slowed(committed("mfd_loss"), 3.0)]),
    )


def test_the_suite_of_a_device():
    whole = ["sana_literal", "occfm_network", "occfm_decoder", "roofline"]
    for device, smoke, steps in (
        ("cpu", False, ["step_digits", "step_sana_mini"]),
        ("cuda", False, ["step_digits", "step_sana_1_6b"]),
        ("cuda", True, ["step_digits", "step_sana_tiny"]),
    ):
        names = suite.suite(device, smoke=smoke)
        assert names[-6:] == steps + whole and names[:-6] == suite.OPERATORS
        assert set(names) <= {one.name for one in suite.ALL}


def test_every_committed_result_has_a_benchmark_that_makes_it():
    files = {one.file or f"{one.name}_cpu.json" for one in suite.ALL}
    others = (
        "digits_mfd_cpu digits_vsd_cpu occfm_demo_cpu reliability_cpu overhead_cpu kernel_bounds"
    )
    files |= {f"{name}.json" for name in [*others.split(), "kernel_bounds"]}
    assert {path.name for path in RESULTS.glob("*.json")} <= files


def test_every_benchmark_is_there():
    for one in suite.ALL:
        for package in one.needs:
            pytest.importorskip(package)
        assert callable(import_module(one.module).benchmark), one.name


def test_what_needs_a_package_is_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == "peft" else object())
    left = [one.name for one in suite.chosen(["sana_literal|roofline"], Options())]
    assert left == ["roofline"]
    assert capsys.readouterr().out == "skipped: sana_literal (needs peft, not installed)\n"
    with pytest.raises(ValueError, match="pip install peft"):
        suite.chosen(["sana_literal"], Options())


def test_one_that_fails_keeps_what_it_measured_and_stops_no_other(tmp_path, monkeypatch, capsys):
    commands = []

    def fake(command, **_):
        name = command[3]
        commands.append(command[3:])
        if name != "roofline":
            (tmp_path / f"{name}_cpu.json").write_text(json.dumps(committed("step")))
        return subprocess.CompletedProcess(command, int(name != "step_sana_mini"))

    monkeypatch.setattr(suite, "subprocess", SimpleNamespace(run=fake))
    names = ["step_digits", "step_sana_mini", "roofline"]
    argv = [*names, "--device", "cpu", "--smoke", "--no-compile", "--out", str(tmp_path)]
    assert suite.main(argv) == 1
    typed = ["--device", "cpu", "--only", "", "--repeats", "0", "--smoke", "--no-compile"]
    assert commands[1] == ["step_sana_mini", *typed, "--out", str(tmp_path)]
    error = capsys.readouterr().err
    assert "step_digits failed with status 1; roofline failed with status 1: see above" in error
    assert (tmp_path / "report.html").read_text().count("whole updates") == 2


def test_the_report_has_every_kind_of_result(tmp_path):
    every = [slowed(committed(op), 3.0) for op in sorted(COMPARED)]
    write_page(every, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert results.summary(every) in page.replace("&#x27;", "'") and "speed-up" in page
    for title in ("mfd loss", "whole updates, digits", "sana literal", "occfm network",
                  "occfm decoder", "roofline"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    for result in every:
        cells = [cell for row in table_of(result)[1] for cell in row]
        assert "3.00" in cells, result["op"]


def test_rows_are_joined_only_with_those_of_the_same_work(tmp_path):
    result, path = committed("mfd_loss"), tmp_path / "mfd_loss_cpu.json"
    rows = result.pop("rows")
    results.save(path, result, rows[:2])
    results.save(path, result, rows[2:])
    assert json.loads(path.read_text())["rows"] == rows
    results.save(path, result | {"commit": "another"}, rows[:1])
    assert json.loads(path.read_text())["rows"] == rows[:1]


def test_bench_from_the_command_line(tmp_path, capsys):
    argv = ["interpolate|occfm_decoder", "--out", str(tmp_path), "--smoke", "--device", "cpu"]
    assert suite.main(argv) == 0
    names = {"interpolate_cpu.json", "occfm_decoder_cpu.json", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert suite.main(argv) == 2
    assert "holds a report already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "'nothing' finds no benchmark; there is"),
        (["("], "'(' must be a regular expression"),
        (["interpolate", "--only", "nothing", "--smoke"], "--only 'nothing' finds no case of"),
    ],
)
def test_a_wrong_bench_is_one_sentence(argv, message, capsys):
    assert suite.main([*argv, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
