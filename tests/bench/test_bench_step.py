"""Benchmarks of whole updates, roofs, the suite and the page made from their results."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import harness, running
from bench.__main__ import main
from bench.pages import cost, performance, readme, waterfall
from bench.predict import roofline
from bench.results import RESULTS
from bench.updates import networks, step, variants
from mfd_fast.backbones.lanes import AUX, TEACHER, TEACHER_UNCOND
from mfd_fast.run.environment import peak_memory, peak_memory_counts
from mfd_fast.testing.numerics import assert_as_accurate

ROOT = Path(__file__).parents[2]


def test_one_lane_a_call_gives_what_all_lanes_give():
    torch.manual_seed(0)
    backbone, cond = variants._digits("digits", "lane-packed", "cpu", 64)
    lanes = (TEACHER, TEACHER_UNCOND, AUX)
    x, t = torch.randn(64, 3, 1, 8, 8), torch.rand(64)
    with torch.no_grad():
        packed = backbone.forward(x, t, backbone.prepare(cond), lanes)
        one_by_one = variants.Sequential(backbone)
        apart = one_by_one.forward(x, t, one_by_one.prepare(cond), lanes)
        for network in (backbone.teacher, backbone.aux):
            network.double()
        backbone.dtype = torch.float64
        exact = backbone.forward(x.double(), t, backbone.prepare(cond), lanes)
    assert_as_accurate(apart, packed, exact)


def test_regional_compilation_takes_every_block_and_nothing_else(monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    loop = variants.make_loop("sana-tiny", "literal regional", "cpu")
    assert not compiled  # its operators are counted first
    assert loop.finish() == 2
    assert [kind.__name__ for kind in compiled] == ["SanaTransformerBlock"] * 2


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_the_small_sanas_are_those_of_the_literal_loop(name):
    pytest.importorskip("diffusers")
    from bench.updates.sana_sizes import SIZES

    size, ours = SIZES[name], networks.SANAS[name]
    assert {key: size.transformer[key] for key in ours} == ours
    assert size.prompt_tokens == networks.TEXT and size.side == ours["sample_size"]


RATES = {"tflops": 1.0, "bf16_tflops": 2.0, "fp32_tflops": 1.0, "gb_s": 100.0, "host_us": 1.0}
ROUNDING = 1e-5  # seconds in a result file have five decimals
PARTS = {
    "aux": ["generate", "forward", "backward", "optimizer"],
    "student": ["generate", "integrate", "backward", "optimizer"],
}


def rows_of(model, variant):
    return step.measure(model, variant, "cpu", 1, RATES)


@pytest.mark.parametrize(
    ("model", "variant"),
    [("digits", "block"), ("sana-tiny", "published"), ("sana-tiny", "lane-packed"),
     ("sana-tiny", "cheap"), ("occfm-tiny", "sequential"), ("occfm-tiny", "batch 2")],
)  # fmt: skip
def test_rows_of_a_variant(model, variant):
    if variant in variants.DIFFUSERS and model.startswith("sana"):
        pytest.importorskip("diffusers")
        pytest.importorskip("peft")
    rows = rows_of(model, variant)
    step.add_rates(rows, RATES, (10, 1))
    assert [row["update"] for row in rows] == ["aux", "student"]
    for row in rows:
        parts = [name.split("/")[1] for name in row["phases"]]
        besides = {"encode", "image"} if variant == "published" else set()
        assert [name for name in parts if name not in besides] == PARTS[row["update"]]
        assert besides <= set(parts) or row["update"] == "aux"
        inside = sum(phase["seconds"] for phase in row["phases"].values())
        assert 0 < inside < row["seconds"] + ROUNDING
        at_rates = sum(phase["at_rates"] for phase in row["phases"].values())
        assert row["at_rates"] + ROUNDING > at_rates > 0
        assert row["operators"] >= sum(phase["operators"] for phase in row["phases"].values())
        assert row["tflop_s"] == pytest.approx(1e-3 * row["gflop"] / row["seconds"], abs=1e-4)
        assert row["joules"] is row["nvml_mb"] is row["launches"] is row["waits"] is None
    cycle = 10 * rows[0]["seconds"] + rows[1]["seconds"]
    assert rows[0]["cycles_per_hour"] == pytest.approx(3600 / cycle, abs=0.01)


def test_a_second_order_solver_halves_the_integration():
    euler, ab2 = (rows_of("digits", name) for name in ("lane-packed", "ab2"))
    assert ab2[0]["gflop"] == euler[0]["gflop"]  # the auxiliary's update has no solver
    at_rates = [rows[1]["phases"]["student/integrate"]["at_rates"] for rows in (ab2, euler)]
    assert at_rates[0] == pytest.approx(at_rates[1] / 2, rel=0.02)  # and the loss, once


def test_ours_reads_nothing_but_its_own_table_on_the_host():
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    literal, ours = rows_of("sana-tiny", "literal"), rows_of("sana-tiny", "fused")
    assert all(row["host_reads"] > 10 for row in literal)
    assert [row["host_reads"] for row in ours] == [0, 2]  # t and r, made by the host
    assert ours[1]["operators"] < literal[1]["operators"] / 3


def test_peak_memory_of_a_gpu_counts_graph_pools(monkeypatch):
    """What a graph computes with is free to the allocator, and taken from the GPU all the same."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: 7)
    assert peak_memory("cuda") == 7
    assert "graph pools" in peak_memory_counts("cuda") and "resident" in peak_memory_counts("cpu")


def test_peak_memory_is_that_of_updates_alone(monkeypatch):
    order = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: order.append(name))
    step.update_from_empty_cache(lambda: order.append("update"))
    assert order[:4] == ["synchronize", "empty_cache", "reset_peak_memory_stats", "update"]


def test_a_result_says_what_its_memory_counts(tmp_path, monkeypatch):
    rows = rows_of("digits", "lane-packed")
    monkeypatch.setattr(step, "elsewhere", lambda *_, **__: rows)
    monkeypatch.setattr(step, "rates_here", lambda _: RATES)
    options = ["--device", "cpu", "--only", "lane-packed", "--out", str(tmp_path)]
    assert main(["step_digits", *options]) == 0
    config = json.loads((tmp_path / "step_digits_cpu.json").read_text())["config"]
    assert config["peak_mb"] == peak_memory_counts("cpu") and "whole GPU" in config["nvml_mb"]


def test_variants_of_a_device():
    names = variants.variants_of("digits", "cuda")
    assert names[0] == "sequential" and "captured" in names and "batch 8" in names
    assert not {"captured", "batch 8", "fp8"} & set(variants.variants_of("sana-mini", "cpu"))
    assert "literal" not in variants.variants_of("occfm", "cuda")


def test_on_a_gpu_what_follows_captured_is_captured():
    assert variants._captured_variants("cpu") == set()
    captured = variants._captured_variants("cuda")
    assert {"captured", "block", "batch 8", "ab2", "fp8"} <= captured
    assert not {"fused", "literal", "sequential"} & captured


def test_without_diffusers_its_variants_are_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    assert variants.variants_of("sana-1.6b", "cuda")[0] == "prepared"
    assert (
        "skipped: published, literal, literal compiled, literal regional, sequential"
        in capsys.readouterr().out
    )


def test_a_variant_that_fails_is_named_and_the_others_stay(tmp_path, monkeypatch, capsys):
    def elsewhere(_, model, variant, *__):
        if variant == "lane-packed":
            raise running.BenchmarkError("measure failed with status 1")
        return rows_of(model, variant)

    monkeypatch.setattr(step, "elsewhere", elsewhere)
    argv = ["step_digits", "--device", "cpu", "--only", "seq|lane", "--out", str(tmp_path)]
    assert main(argv) == 1
    assert "failed, see above: lane-packed" in capsys.readouterr().err
    result = json.loads((tmp_path / "step_digits_cpu.json").read_text())
    assert {row["variant"] for row in result["rows"]} == {"sequential"}
    assert result["config"]["rates"]["tflops"] > 0 and result["config"]["cycle"] == [5, 1]


def test_what_runs_on_a_gpu_machine_needs_no_further_package():
    banned = ["diffusers", "peft", "transformers", "matplotlib", "sklearn", "scipy", "PIL", "tyro"]
    code = (
        "import sys; import torch; before = set(sys.modules); import bench.__main__; "
        "import bench.predict.roofline; from bench.updates import step, variants; "
        "[variants.make_loop(model, 'lane-packed' if model == 'digits' else 'fused', 'cpu') "
        "for model in ('digits', 'sana-tiny', 'occfm-tiny')]; "
        f"print([m for m in {banned} if m in set(sys.modules) - before])"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_page_is_what_the_results_say():
    assert performance.PAGE.read_text() == performance.render(), "run: python -m bench.pages"
    guide = cost.PAGE.read_text()
    assert guide == readme.render(guide, cost.TABLES), "run: python -m bench.pages"
    for path in performance.waterfalls():
        assert performance.picture_of(path).is_file()


def test_the_waterfall_of_the_small_sana_is_committed():
    result = json.loads((RESULTS / "step_sana_mini_cpu.json").read_text())
    by_variant = waterfall.variants(result)
    there = variants.variants_of("sana-mini", "cpu")  # "literal regional" came later
    assert list(by_variant) == [name for name in there if name != "literal regional"]
    assert waterfall.reference(by_variant) is by_variant["literal"]
    assert all(set(roles) == {"aux", "student"} for roles in by_variant.values())


def test_the_parts_of_an_update_are_all_of_it():
    result = json.loads((RESULTS / "step_digits_cpu.json").read_text())
    for row in result["rows"]:
        parts = waterfall.parts(row)
        assert sum(parts.values()) * row["batch"] >= row["seconds"] - ROUNDING
        assert set(parts) <= set(waterfall.COLOURS)


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


def test_the_readme_counts_operators_as_the_result_does():
    result = json.loads((RESULTS / "published_cost.json").read_text())
    once = {row["part"]: row["operators_once"] for row in result["rows"]}
    literal = once["teacher, guided"] + once["auxiliary, no gradient"]
    ours = result["config"]["operators_of_an_ode_step_of_ours"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{ours} operators an ODE step for three lanes against {literal:,}" in text


def test_the_published_cycle_has_the_methods_evaluations():
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from bench.predict import published_cost

    result = json.loads((RESULTS / "published_cost.json").read_text())
    times = {row["part"]: row["times"] for row in result["rows"]}
    expected = round(published_cost.evaluations(), 2)
    assert times["teacher, guided"] == times["auxiliary, no gradient"] == expected
    assert times["student, no gradient"] == 10 * 4 and times["encode a prompt"] == 11
    sana = {row["part"]: row["tflop"] / row["times"] for row in result["rows"]}
    assert abs(sana["teacher, guided"] / (2 * 2.97) - 1) < 0.01  # two lanes of 2.97 TFLOP


def test_a_failed_capture_ends_the_benchmark(monkeypatch):
    """After it the allocator refuses ``empty_cache`` and every later capture of the process."""
    calls = []

    class Capture(nullcontext):
        def __exit__(self, *_):
            raise RuntimeError("capture failed")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "synchronize": lambda: None,
        "CUDAGraph": lambda: None,
        "graph": Capture,
        "empty_cache": lambda: calls.append("empty_cache"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(harness, "WARMUP_S", 0.0)
    with pytest.raises(RuntimeError, match="capture failed"):
        harness._measure_cuda(lambda x: calls.append("run") or x, [(1,)])
    assert set(calls) == {"run"}
