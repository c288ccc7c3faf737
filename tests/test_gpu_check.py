"""scripts/gpu_check.sh, as far as a machine without a GPU can run it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
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
def test_runs_stages_and_collects_results(tmp_path, bare):
    done = gpu_check(
        tmp_path,
        **bare,
        DRY_RUN="1",
        STAGES="test bench",
        TESTS="tests/test_interpolate.py",
        BENCH="interpolate occfm",  # the second is no operator
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
    assert file.name == "interpolate_cpu.json"
    assert json.loads(file.read_text())["op"] == "interpolate"


@pytest.fixture(scope="module")
def gpu_results():
    """The module of the script."""
    spec = importlib.util.spec_from_file_location("gpu_results", ROOT / "scripts/gpu_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("device", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000"),
        ("AMD EPYC 9654 96-Core Processor", "cpu"),
    ],
)
def test_short_names_of_devices(gpu_results, device, short):
    assert gpu_results.short(device) == short


def step_result(rows: dict[tuple[str, str], float], **head: object) -> dict:
    """A result of ``bench.bench_step`` with these seconds by variant and role."""
    known = {"op": "step", "device": "NVIDIA H100 80GB HBM3", "commit": "abc", "threads": 1}
    return {
        **known,
        "config": {"model": "sana-1.6b", "interval": [0.6, 0.4], "step": 0.02},
        "rows": [
            {"variant": variant, "update": role, "batch": 1, "seconds": seconds}
            for (variant, role), seconds in rows.items()
        ],
        **head,
    }


def unpacked(gpu_results, folder: Path, result: dict) -> dict[tuple[str, str], float]:
    """The rows that the committed file has after ``unpack``."""
    file = folder / "results.json"
    file.write_text(json.dumps({"bench": {}, "results": {"step_sana_1_6b": result}}))
    gpu_results.unpack(file, folder / "committed")
    (path,) = (folder / "committed").iterdir()
    assert path.name == "step_sana_1_6b_h100.json"
    rows = json.loads(path.read_text())["rows"]
    return {(row["variant"], row["update"]): row["seconds"] for row in rows}


def test_runs_of_some_variants_make_one_result(gpu_results, tmp_path):
    fused = {("fused", "aux"): 2.0, ("fused", "student"): 3.0}
    assert unpacked(gpu_results, tmp_path, step_result(fused)) == fused
    literal = {("literal", "aux"): 8.0, ("fused", "aux"): 1.0}
    joined = unpacked(gpu_results, tmp_path, step_result(literal))
    assert list(joined.items()) == [
        (("literal", "aux"), 8.0), (("fused", "aux"), 1.0), (("fused", "student"), 3.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"commit": "def"}, {"threads": 2}, {"config": {"model": "sana-1.6b", "step": 0.04}}]
)
def test_results_of_other_work_are_not_joined(gpu_results, tmp_path, change):
    unpacked(gpu_results, tmp_path, step_result({("fused", "aux"): 2.0}))
    new = {("literal", "aux"): 8.0}
    assert unpacked(gpu_results, tmp_path, step_result(new, **change)) == new


def test_what_a_run_has_measured_is_placed_while_it_runs(gpu_results, tmp_path):
    result = step_result({("fused", "aux"): 2.0})
    (tmp_path / "result_step_sana_1_6b.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text("{}")
    gpu_results.place(tmp_path, tmp_path / "placed")
    (path,) = (tmp_path / "placed").iterdir()
    assert path.name == "step_sana_1_6b_h100.json" and json.loads(path.read_text()) == result


@without_gpu
def test_a_failing_stage_fails_the_run(tmp_path):
    done = gpu_check(tmp_path, DRY_RUN="1", STAGES="test", TESTS="tests/no_such_file.py")
    assert done.returncode == 1
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "failed"


def test_refuses_an_unknown_stage(tmp_path):
    done = gpu_check(tmp_path, DRY_RUN="1", STAGES="biuld")
    assert done.returncode == 2
    assert "unknown stage 'biuld'" in done.stderr


# Of what is installed only ALLOWED is found, with what these need and what they ship within.
ALLOWED = ("torch", "triton", "numpy", "safetensors", "nvidia-ml-py", "pytest", "setuptools")
PARTS = {
    "torch": "torch functorch torchgen",
    "pytest": "pytest _pytest py",
    "nvidia-ml-py": "pynvml",
    "setuptools": "setuptools _distutils_hack",
}
BARE = """
import re, sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
        owners = set(re.findall(r"site-packages/(\\w+)", " ".join(map(str, places))))
        return spec if owners <= {allowed} else None

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def modules_of(packages: tuple[str, ...]) -> set[str]:
    """Top-level modules of packages and of what they need."""
    found, todo = set(), list(packages)
    while todo:
        package = todo.pop()
        found |= set(PARTS.get(package, package.replace("-", "_")).split())
        try:
            needs = [need for need in requires(package) or () if "extra ==" not in need]
        except PackageNotFoundError:
            continue
        todo += {re.match(r"[\w-]+", need)[0].lower() for need in needs} - found
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """Environment in which Python finds no package but ``ALLOWED``, in child processes neither."""
    folder = tmp_path_factory.mktemp("bare")
    allowed = modules_of(ALLOWED)
    (folder / "sitecustomize.py").write_text(BARE.replace("{allowed}", repr(allowed)))
    # Entry points of plugins that are installed here are found all the same.
    return {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def python(bare: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    env = os.environ | bare
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_bare_python_lacks_what_this_one_has(bare):
    for name in ("scipy", "tyro", "rich"):
        assert importlib.util.find_spec(name), f"{name} is not installed: nothing is tested"
        done = python(bare, "-c", f"import {name}")
        assert f"No module named '{name}'" in done.stderr
    assert python(bare, "-c", "import torch, numpy, safetensors, mfd_fast").returncode == 0


CPU = "--device cpu"
# stage -> settings that make it small, results
SMALL = {
    "step": (
        {
            "STEP_MODELS": "digits sana-tiny",
            "STEP_FLAGS": f"--smoke {CPU} --only fused|lane-packed",
        },
        ["step_digits", "step_sana_tiny"],
    ),
    "memory": ({"MEMORY_FLAGS": f"{CPU} --only occfm"}, ["predicted_memory"]),
    "occfm": ({"OCCFM_FLAGS": f"--smoke {CPU}"}, ["occfm_decoder", "occfm_network"]),
    "estimate": (
        {"ESTIMATE_PRESETS": "sana-tiny", "ESTIMATE_FLAGS": f"{CPU} --cycles 1"},
        ["estimate_sana_tiny"],
    ),
    "profile": (
        {"PROFILE_PRESETS": "digits", "PROFILE_FLAGS": f"{CPU} --cycles 1"},
        ["profile_digits"],
    ),
    "roofline": ({}, ["roofline"]),
    "baseline": ({}, []),
}  # fmt: skip


@without_gpu
@pytest.mark.slow
@pytest.mark.parametrize("stage", SMALL)
def test_a_stage_runs_on_a_bare_machine(stage, bare, tmp_path):
    env, expected = SMALL[stage]
    done = gpu_check(tmp_path, DRY_RUN="1", STAGES=stage, **env, **bare)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    report = json.loads((tmp_path / "results.json").read_text())
    assert sorted(report["bench"] | report["results"]) == expected
    assert all(result["rows"] for result in report["results"].values())
    if stage == "baseline":
        assert "skipped, diffusers and peft are not installed" in done.stdout


@without_gpu
@pytest.mark.slow
def test_the_literal_loop_has_a_stage(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    env = {"BASELINE_FLAGS": "--size tiny --repeats 2"}
    done = gpu_check(tmp_path, DRY_RUN="1", STAGES="baseline", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["results"]["sana_literal"]["config"]["size"] == "tiny"


def test_every_other_stage_is_tried(bare):
    """Two are tried above; what the others import is tried here, for they need a GPU to run."""
    text = (ROOT / "scripts/gpu_check.sh").read_text()
    stages = set(re.findall(r"^stage_(\w+)\(\)", text, re.MULTILINE))
    assert stages - set(SMALL) == {"test", "bench", "build", "sanitize", "time"}
    for command in (
        ("-m", "bench.predicted_time", "--help"),
        ("setup.py", "--version"),
        ("scripts/launch_every_kernel.py", "--help"),
    ):
        done = python(bare, *command)
        assert done.returncode == 0, done.stderr


def test_every_operator_is_launched():
    """The script that the sanitizers run, on the CPU; it fails if an operator has no call."""
    script = ROOT / "scripts/launch_every_kernel.py"
    command = [sys.executable, str(script), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
