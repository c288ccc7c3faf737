"""Benchmarks of whole updates, roofs, the suite and the page made from their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bench_step, performance, roofline, sana_mini, suite
from mfd_fast import cli
from mfd_fast.backbone import AUX, TEACHER, TEACHER_UNCOND

from numerics import assert_as_accurate

ROOT = Path(__file__).parent.parent


def test_one_lane_a_call_gives_what_all_lanes_give():
    torch.manual_seed(0)
    backbone, cond = bench_step._digits("digits", "lane-packed", "cpu", 1)
    lanes = (TEACHER, TEACHER_UNCOND, AUX)
    x, t = torch.randn(64, 3, 1, 8, 8), torch.rand(64)
    with torch.no_grad():
        packed = backbone.forward(x, t, backbone.prepare(cond), lanes)
        one_by_one = bench_step.Sequential(backbone)
        apart = one_by_one.forward(x, t, one_by_one.prepare(cond), lanes)
        for network in (backbone.teacher, backbone.aux):
            network.double()
        backbone.dtype = torch.float64
        exact = backbone.forward(x.double(), t, backbone.prepare(cond), lanes)
    assert_as_accurate(apart, packed, exact)


def test_the_mini_sana_is_that_of_the_literal_loop():
    pytest.importorskip("diffusers")
    from bench.sana_sizes import SIZES

    size = SIZES["mini"]
    theirs = {key: size.transformer[key] for key in sana_mini.CONFIG}
    assert theirs == sana_mini.CONFIG and size.prompt_tokens == sana_mini.TEXT
    assert size.side == sana_mini.CONFIG["sample_size"]


def test_rows_of_a_variant():
    rows = bench_step.measure("digits", "ab2", "cpu", 1)
    assert [row["update"] for row in rows] == ["aux", "student"]
    assert all(row["cpu_seconds"] > 0 and row["gflop"] > 0 for row in rows)
    euler = bench_step.measure("digits", "fused", "cpu", 1)
    assert rows[0]["gflop"] == euler[0]["gflop"]  # the auxiliary's update has no solver
    assert rows[1]["gflop"] < euler[1]["gflop"]  # twice the step, fewer evaluations


def test_variants_of_a_device():
    names = bench_step.variants_of("digits", "cuda")
    assert names[0] == "sequential" and "captured" in names and "batch 8" in names
    assert not {"captured", "batch 8"} & set(bench_step.variants_of("sana-mini", "cpu"))


def test_without_diffusers_its_variants_are_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "find_spec", lambda name: None)
    assert bench_step.variants_of("sana-1.6b", "cuda")[0] == "prepared"
    assert (
        "skipped: literal, sequential, lane-packed (diffusers and peft" in capsys.readouterr().out
    )


def test_what_runs_on_a_gpu_machine_needs_no_further_package():
    banned = ["diffusers", "peft", "transformers", "matplotlib", "sklearn", "scipy", "PIL", "tyro"]
    code = (
        "import sys; import torch; before = set(sys.modules); import bench.roofline; "
        "from bench.bench_step import *; make_updates('sana-mini', 'fused', 'cpu'); "
        f"print([m for m in {banned} if m in set(sys.modules) - before])"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_page_is_what_the_results_say():
    assert performance.PAGE.read_text() == performance.render(), "run: python -m bench.performance"
    for path in performance.waterfalls():
        assert performance.picture_of(path).is_file()


def test_the_waterfall_of_the_small_sana_is_committed():
    rows = json.loads((performance.RESULTS / "step_sana_mini_cpu.json").read_text())["rows"]
    assert rows[0]["variant"] == "literal"
    assert {"sequential", "lane-packed", "prepared", "fused", "block"} <= {
        row["variant"] for row in rows
    }


def test_a_roofline_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"kind": "copy", "dtype": "uint8", "gb_s": 20.0}]
    rows += [{"kind": "product", "dtype": "float32", "tflop_s": 0.05}]
    path = next((ROOT / "bench/results").glob("linear_attention_*.json"))
    result = json.loads(path.read_text())
    points = list(roofline.operators(result["device"], result["threads"]))
    assert {"linear_attention", "ode_step"} <= {point["op"] for point in points}
    assert list(roofline.operators("no such device", 1)) == []
    roofline.draw(rows, points, "test", tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_the_suite_compares_with_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib")
    path = ROOT / "bench/results/mfd_loss_cpu.json"
    result = json.loads(path.read_text())
    for row in result["rows"]:
        row["us"] *= 3 if row["impl"] == "ours" else 1
    slower = tmp_path / "mfd_loss.json"
    slower.write_text(json.dumps(result))
    assert {round(row.ratio, 6) for row in suite.compare(result)} == {3.0}
    assert "median now / then 3.00" in suite.report([slower], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "mfd_loss" in page and "data:image/png;base64," in page
    result["threads"] += 1
    assert suite.compare(result) == []


def test_bench_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = str(tmp_path / "bench")
    assert cli.main(["bench", "--out", out, "--only", "^interpolate$", "--smoke"]) == 0
    assert {path.name for path in Path(out).iterdir()} == {
        "interpolate.json", "report.html", "comparison.png",
    }  # fmt: skip
    assert cli.main(["bench", "--out", out]) == 2
    assert "holds a report already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "nothing"], "--only 'nothing' finds no benchmark; there is"),
        (["--only", "("], "--only must be a regular expression"),
        (["--olny", "x"], "unknown option '--olny'"),
    ],
)
def test_a_wrong_bench_is_one_sentence(argv, message, tmp_path, capsys):
    assert cli.main(["bench", "--out", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
