"""``python -m bench.suite``: what it runs, what it compares with, the report."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from bench import suite
from bench.suite import Benchmark, columns_of, compare, time_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
COMPARED = {"mfd_loss", *suite.COLUMNS}


def committed(op: str) -> dict:
    """A committed result of an operator; one of those that a suite compares."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return next(result for result in found if result.get("op") == op)


def slowed(result: dict, factor: float) -> dict:
    """The same result with our rows so many times as slow."""
    columns = columns_of(result)
    for row in result["rows"]:
        if suite.is_ours(row) or columns.is_rate:
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
    names = [suite.case_of(row, columns_of(result)) for row in result["rows"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("key", ["device", "threads"])
def test_another_machine_is_not_compared_with(key):
    result = committed("mfd_loss")
    result[key] = "another" if key == "device" else result[key] + 1
    assert compare(result) == []
    assert suite.summary([result]).startswith("no committed result of this device")


@pytest.mark.parametrize("key", ["model", "interval", "step"])
def test_another_work_is_not_compared_with(key):
    result = committed("step")
    assert compare(result)
    result["config"][key] = "another"
    assert compare(result) == []


def test_the_newest_committed_result_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    for name, date, factor in (("a", "2026-02-01", 2.0), ("b", "2026-01-01", 1.0)):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(slowed(committed("mfd_loss"), factor) | {"date": date})
        )
    now = committed("mfd_loss")
    assert {row.ratio for row in compare(now) if row.is_ours} == {0.5}


def test_ours_and_the_others_are_summed_up_apart():
    assert re.search(
        r"^\d+ rows .*: this project's 3\.00, others' 1\.00 ",
        suite.summary([slowed(committed("mfd_loss"), 3.0)]),
    )


def names(device: str, *, smoke: bool) -> list[str]:
    return [one.name for one in suite.suite(device, smoke=smoke)]


def test_the_suite_of_a_device():
    whole = ["sana-literal", "occfm-network", "occfm-decoder", "roofline"]
    assert names("cpu", smoke=False)[-6:] == ["step-digits", "step-sana-mini", *whole]
    assert names("cuda", smoke=False)[-6:] == ["step-digits", "step-sana-1.6b", *whole]
    assert names("cuda", smoke=True)[-6:] == ["step-digits", "step-sana-tiny", *whole]
    operators = {path.stem for path in (ROOT / "mfd_fast/ops").glob("*.py")
                 if "torch.library.define" in path.read_text()}  # fmt: skip
    assert set(names("cpu", smoke=False)[:-6]) == operators


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_benchmark_has_the_options_it_is_given(device, smoke):
    """An operator's are in ``bench.harness``; so are those of no operator in their own file."""
    for one in suite.suite(device, smoke=smoke):
        text = (ROOT / f"bench/{one.module}.py").read_text()
        if suite.OPERATOR in text:
            text = (ROOT / "bench/harness.py").read_text()
        for option in ("--out", *one.arguments):
            if option.startswith("--"):
                assert f'"{option}"' in text, f"{one.module} has no {option}"


def test_what_needs_a_package_is_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == "peft" else object())
    left = [one.name for one in suite.benchmarks("sana-literal|roofline")]
    assert left == ["roofline"]
    assert capsys.readouterr().out == "skipped: sana-literal (needs peft, not installed)\n"
    with pytest.raises(ValueError, match="pip install peft"):
        suite.benchmarks("sana-literal")


def test_one_that_fails_keeps_what_it_measured_and_stops_no_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    chosen = [Benchmark("a", "bench_a"), Benchmark("b", "bench_b", ("--smoke",)),
              Benchmark("c", "bench_c")]  # fmt: skip
    commands = []

    def fake(command, **_):
        commands.append(command[1:])
        name = Path(command[4]).stem
        if name != "c":
            Path(command[4]).write_text(json.dumps(committed("step")))
        return subprocess.CompletedProcess(command, int(name != "b"))

    monkeypatch.setattr(suite.subprocess, "run", fake)
    monkeypatch.setattr(suite, "benchmarks", lambda only, smoke: chosen)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--out", str(out)])
    assert commands[1] == ["-m", "bench.bench_b", "--out", str(out / "b.json"), "--smoke"]
    error = capsys.readouterr().err
    assert "a (bench.bench_a) failed with status 1; c (bench.bench_c) failed" in error
    assert (out / "report.html").read_text().count("whole updates") == 2


def test_the_report_has_every_kind_of_result(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import suite_page

    files = []
    for op in sorted(COMPARED):
        files.append(tmp_path / f"{op}.json")
        files[-1].write_text(json.dumps(slowed(committed(op), 3.0)))
    line = suite_page.report(files, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert line in page.replace("&#x27;", "'") and "data:image/png;base64," in page
    for title in ("mfd loss", "whole updates, digits", "sana literal", "occfm network",
                  "occfm decoder", "roofline"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    for path in files:
        cells = [
            cell for row in suite_page.table_of(json.loads(path.read_text())).rows for cell in row
        ]
        assert "3.00" in cells, path.stem
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_waterfall_is_against_its_first_variant():
    from bench import suite_page

    row = {"batch": 2, "update": "aux", "variant": "literal", "seconds": 4.0}
    rows = [
        row | {"variant": variant, "update": update, "seconds": seconds}
        for variant, seconds in (("literal", 4.0), ("fused", 1.0))
        for update in ("aux", "student")
    ]
    result = committed("step") | {"device": "another", "rows": rows}
    table = suite_page.table_of(result)
    assert table.rows[0] == ["literal", "2", "2000", "1.00x", "", "2000", "1.00x", ""]
    assert table.rows[1] == ["fused", "2", "500", "4.00x", "", "500", "4.00x", ""]


def test_bench_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = str(tmp_path / "bench")
    only = "^(interpolate|occfm-decoder)$"
    suite.main(["--out", out, "--only", only, "--smoke"])
    assert {path.name for path in Path(out).iterdir()} == {
        "interpolate.json", "occfm-decoder.json", "report.html", "comparison.png",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--out", out])
    assert "holds a report already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "nothing"], "--only 'nothing' finds no benchmark; there is"),
        (["--only", "("], "--only must be a regular expression"),
        (["--olny", "x"], "unrecognized arguments: --olny"),
    ],
)
def test_a_wrong_bench_is_one_sentence(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--out", str(tmp_path / "out"), *argv])
    assert message in capsys.readouterr().err.splitlines()[-1]
