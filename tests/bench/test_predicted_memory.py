"""predicted_memory: what is compared with what; on a GPU by a made-up allocator."""

import json
from functools import partial

import pytest
import torch

from bench.__main__ import main
from bench.predict import predicted_memory
from bench.predict.predicted_memory import CASES, GPU_CASES, Case, cases_of, measured, predicted
from bench.updates import networks

TINY = partial(networks.make_sana, "tiny", dtype=torch.float32)


class Allocator:
    """``torch.cuda``'s counters; ``run`` moves them as a run of that many samples would."""

    KEPT = 7  # by libraries, since the first run
    RESERVED = 100  # more than is in use

    def __init__(self, monkeypatch):
        self.allocated = self.peak = 0
        self.batches: list[int] = []
        names = {
            "memory_allocated": lambda: self.allocated,
            "max_memory_allocated": lambda: self.peak,
            "memory_reserved": lambda: self.allocated + self.RESERVED * bool(self.batches[1:]),
            "reset_peak_memory_stats": self.reset,
            "empty_cache": lambda: None,
        }
        for name, function in names.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def reset(self):
        self.peak = self.allocated

    def run(self, case, device, batch=0):
        samples = batch or case.batch
        self.batches.append(samples)
        self.reset()
        self.peak = self.KEPT + 1000 * samples
        self.allocated = self.KEPT + (500 * samples if self.batches[1:] else 0)


@pytest.mark.parametrize(("is_captured", "expected"), [(False, 4000), (True, 2000 + 100)])
def test_on_a_gpu_the_allocator_is_asked(monkeypatch, is_captured, expected):
    """The peak above what libraries keep; of a captured run what stays reserved."""
    allocator = Allocator(monkeypatch)
    monkeypatch.setattr(predicted_memory, "run", allocator.run)
    assert measured(Case(TINY, 4, is_captured), "cuda") == expected
    assert allocator.batches == [1, 4]


def test_making_the_network_is_not_counted(monkeypatch):
    """The peak is reset after the 16-bit network was made from a float32 one."""
    order = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))

    def make(device):
        order.append("make")
        return TINY("cpu")

    class Stub:
        def __init__(self, *_):
            order.append("distiller")

        def step(self, cond):
            order.append(len(cond["text"]))

    monkeypatch.setattr(predicted_memory, "Distiller", Stub)
    predicted_memory.run(Case(make, 3), "cuda")
    assert order == ["make", "distiller", "reset", *[3] * predicted_memory.UPDATES]


def test_a_captured_run_is_predicted_by_its_pools():
    plain, pools = predicted(Case(TINY, 2)), predicted(Case(TINY, 2, is_captured=True))
    assert "activations" in plain and "activations" not in pools
    assert {f"graph pool, {name}" for name in ("updates", "integration")} <= set(pools)
    assert "CUDA context" not in {*plain, *pools}
    assert all(plain[key] == pools[key] for key in ("weights", "gradients", "optimizer"))


def test_cases_of_a_device():
    assert cases_of("cpu") is CASES and cases_of("cuda") is GPU_CASES
    assert {"digits", "sana-mini", "occfm-tiny"} <= set(CASES) & set(GPU_CASES)
    assert {"sana-1.6b", "sana-1.6b, block", "sana-1.6b, captured"} <= set(GPU_CASES)
    assert [name for name, case in GPU_CASES.items() if case.is_captured] == ["sana-1.6b, captured"]


def test_the_published_sana_is_predicted_in_16_bits():
    """1.6 billion numbers of two bytes, and less to keep when blocks are recomputed."""
    none, block = (predicted(GPU_CASES[name]) for name in ("sana-1.6b", "sana-1.6b, block"))
    assert 3.1e9 < none["weights"] < 3.4e9 and none["weights"] == block["weights"]
    assert block["activations"] < none["activations"] / 2


def test_a_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predicted_memory, "measured_elsewhere", lambda name, device: 10**9)
    argv = ["predicted_memory", "--device", "cpu", "--out", str(tmp_path), "--only", "occfm"]
    assert main(argv) == 0
    (row,) = json.loads((tmp_path / "predicted_memory_cpu.json").read_text())["rows"]
    assert row["case"] == "occfm-tiny" and row["measured_mb"] == 1000.0
    assert row["ratio"] == pytest.approx(row["predicted_mb"] / 1000, abs=1e-3)
    assert main([*argv[:-1], "nothing"]) == 2
    assert capsys.readouterr().err == "--only 'nothing' finds no case of predicted_memory\n"


@pytest.mark.gpu
@pytest.mark.parametrize("is_captured", [False, True])
def test_on_this_gpu(is_captured):
    assert measured(Case(TINY, 1, is_captured), "cuda") > 0
