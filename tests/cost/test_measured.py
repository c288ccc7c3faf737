"""Predictions from measured updates: which result belongs to a device, and what is fitted to it."""

import json
from dataclasses import replace

import pytest
import torch

from mfd_fast.cost import device_named, measured
from mfd_fast.cost.devices import Efficiency, Fit, Host
from mfd_fast.cost.measured import calibrated, efficiency_here, fit
from mfd_fast.cost.phases import phase_of
from mfd_fast.cost.table import _efficiency
from mfd_fast.cost.trace import Op, Work

RATES = {"bf16_tflops": 700.0, "fp32_tflops": 50.0, "gb_s": 3000.0, "host_us": 4.0}


def row(variant, update="student", batch=1, seconds=1.0, at_rates=0.5, operators=100, **phases):
    phases = {f"{update}/{name}": values for name, values in phases.items()}
    return {
        **{"variant": variant, "update": update, "batch": batch, "seconds": seconds},
        **{"at_rates": at_rates, "operators": operators, "gflop": batch, "phases": phases},
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)

    def add(device, model, rows, driver="570.1", threads=8):
        config = {"model": model, "rates": RATES}
        facts = {"device": device, "driver": driver, "threads": threads}
        path = tmp_path / f"step_{model}_{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(facts | {"config": config, "rows": rows}))
        return path.name

    return add


def points_of(share, host):
    """Three batches of a phase that follows the model exactly."""
    return [
        (ideal, ops, ideal / share + ops * host)
        for ideal, ops in ((0.1, 300), (0.2, 310), (0.8, 320))
    ]


@pytest.mark.parametrize(("share", "host"), [(0.4, 1e-4), (1.3, 2e-5), (0.7, 0.0)])
def test_share_and_host_are_found_again(share, host):
    found = fit(points_of(share, host))
    assert found.share == pytest.approx(share, rel=1e-9)
    assert found.host_seconds == pytest.approx(host, rel=1e-6, abs=1e-12)


def test_without_two_batches_that_differ_the_share_explains_all():
    assert fit([(0.5, 100, 2.0)]) == Fit(0.25, 0.0)
    assert fit([(0.5, 100, 2.0), (0.5, 100, 2.0)]) == Fit(0.25, 0.0)
    grows = [(0.1, 300, 0.1), (0.2, 300, 0.4)]  # the host's part would be negative
    assert fit(grows).host_seconds == 0.0 and 0.5 < fit(grows).share < 1.0


def test_a_fit_takes_the_place_of_assumed_shares():
    work = Work()
    work.calls[Op("mm", "product", torch.bfloat16, 2e12, 1.0)] += 1
    work.calls[Op("add", "memory", torch.bfloat16, 0.0, 1e9)] += 9
    device = device_named("card", bf16_tflops=100.0, bandwidth=1e12, memory=1e9)
    at_rates = 0.02 + 9 * 1e-3
    fits = {"student": Fit(0.5, 1e-3), "student/integrate": Fit(0.25, 0.0)}
    used = Efficiency({}, 1.0, Host(1e-6, 1e-6, ""), "", fits)
    seconds = {
        name: phase_of(work, device, used, name).seconds.low
        for name in ("student/integrate", "student/backward", "aux/generate")
    }
    assert seconds == {
        "student/integrate": pytest.approx(at_rates / 0.25),
        "student/backward": pytest.approx(at_rates / 0.5 + 10 * 1e-3),
        "aux/generate": pytest.approx(at_rates),
    }
    assert "50% in updates of the student" in _efficiency(used)


@pytest.mark.parametrize(
    ("name", "board"),
    [
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
        ("a100-40gb", "NVIDIA A100-SXM4-40GB"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("rtx6000-ada", "NVIDIA RTX 6000 Ada Generation"),
        ("l4", "NVIDIA L4"),
    ],
)
def test_a_name_of_ours_finds_its_board(name, board, results):
    file = results(board, "sana-1.6b", [row("captured")])
    device, efficiency = calibrated(device_named(name), "sana-1.6b-official", is_captured=True)
    assert (device.bf16_tflops, device.bandwidth) == (700.0, 3e12)
    assert device.memory == device_named(name).memory  # the rest is the data sheet's
    assert file in device.source and "vendor data sheet" in device.source
    assert efficiency.source == f"bench/results/{file}, captured, batch 1"


@pytest.mark.parametrize(
    "name", ["h100", "l4", "a10", "a6000", "rtx-pro-6000", "a100-40gb", "b200", "h200"]
)
def test_a_name_does_not_find_another_board(name, results):
    for board in ("NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA A10G", "NVIDIA GH200"):
        results(board, "sana-1.6b", [row("captured")])
    assert calibrated(device_named(name), "sana-1.6b", is_captured=True) is None


def test_a_result_of_a_cpu_needs_its_threads(results):
    results("AMD EPYC", "sana-mini", [row("fused")], driver=None, threads=2)
    card = device_named("x", bf16_tflops=1.0, bandwidth=1e9, memory=1e9)
    assert calibrated(replace(card, name="AMD EPYC, 2 threads"), "sana-1.6b") is not None
    for name, preset in (("AMD EPYC, 1 threads", "sana-1.6b"), ("AMD EPYC, 2 threads", "digits")):
        here, rates = efficiency_here(replace(card, name=name), preset)
        assert here.bandwidth == 1e9 and rates.phases == {} and rates.host.low > 0


def test_captured_runs_are_predicted_from_captured_updates(results):
    rows = [row("fused", seconds=9.0), row("captured", seconds=1.0), row("batch 2", batch=2)]
    name = results("NVIDIA H100 80GB HBM3", "sana-1.6b", rows)
    device = device_named("h100")
    for is_captured, source in ((False, "fused, batch 1"), (True, "captured, batch 1, 2")):
        _, efficiency = calibrated(device, "sana-1.6b", is_captured=is_captured)
        assert efficiency.source == f"bench/results/{name}, {source}"
    results("NVIDIA L4", "digits", [row("captured"), row("batch 2", batch=2)])  # bench_step --only
    assert calibrated(device_named("l4"), "digits") is None
    eager_only = [row("lane-packed"), row("batch 4", batch=4)]
    results("NVIDIA H100 80GB HBM3", "digits", eager_only)
    assert calibrated(device, "digits", is_captured=True) is None
    assert calibrated(device, "digits")[1].source.endswith("lane-packed, batch 1, 4")


def test_the_presets_own_result_comes_first(results):
    larger = row("fused", batch=8, at_rates=4.0)
    for model, rows in (("sana-mini", [larger]), ("sana-tiny", [row("fused")])):
        results("NVIDIA H100", model, rows)
    device = device_named("h100")
    assert "step_sana-tiny" in calibrated(device, "sana-tiny")[1].source
    assert "step_sana-mini" in calibrated(device, "sana-1.6b")[1].source  # else the largest


def test_phases_are_fitted_where_they_were_counted(results):
    generate = {"seconds": 0.4, "at_rates": 0.1, "operators": 10}
    results("NVIDIA H100", "digits", [row("captured", generate=generate, finish={"seconds": 0.6})])
    fits = calibrated(device_named("h100"), "digits", is_captured=True)[1].phases
    assert fits == {"student": Fit(0.5, 0.0), "student/generate": Fit(0.25, 0.0)}
