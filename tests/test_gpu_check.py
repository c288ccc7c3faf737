"""scripts/gpu_check.sh, as far as a machine without a GPU can run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about having no GPU")


def gpu_check(out: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), str(out)],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        check=False,
    )


@without_gpu
def test_says_that_there_is_no_gpu(tmp_path):
    done = gpu_check(tmp_path)
    assert done.returncode == 3
    assert "skipped: no GPU" in done.stdout
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["status"].startswith("skipped: no GPU")
    assert report["bench"] == {}


@without_gpu
def test_runs_stages_and_collects_results(tmp_path):
    done = gpu_check(
        tmp_path,
        DRY_RUN="1",
        STAGES="test bench",
        TESTS="tests/test_interpolate.py",
        BENCH="interpolate",
        BENCH_FLAGS="--smoke --device cpu",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["test", "bench_interpolate"]
    assert {row["impl"] for row in report["bench"]["interpolate"]["rows"]} >= {"eager", "ours"}
    assert "gpu check: passed" in done.stdout.splitlines()[-1]
    assert "==== test" in (tmp_path / "log.txt").read_text()

    unpack = [sys.executable, str(ROOT / "scripts/gpu_results.py"), "unpack"]
    subprocess.run([*unpack, str(tmp_path / "results.json"), str(tmp_path / "each")], check=True)
    (file,) = (tmp_path / "each").iterdir()
    assert json.loads(file.read_text())["op"] == "interpolate"


@without_gpu
def test_a_failing_stage_fails_the_run(tmp_path):
    done = gpu_check(tmp_path, DRY_RUN="1", STAGES="test", TESTS="tests/no_such_file.py")
    assert done.returncode == 1
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "failed"


def test_refuses_an_unknown_stage(tmp_path):
    done = gpu_check(tmp_path, DRY_RUN="1", STAGES="biuld")
    assert done.returncode == 2
    assert "unknown stage 'biuld'" in done.stderr


def test_every_operator_is_launched():
    """The script that the sanitizers run, on the CPU; it fails if an operator has no call."""
    script = ROOT / "scripts/launch_every_kernel.py"
    command = [sys.executable, str(script), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
