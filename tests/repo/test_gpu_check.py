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

from bench import results
from scripts.gpu_results import place

ROOT = Path(__file__).resolve().parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about having no GPU")


def gpu_check(out: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), str(out), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def stages_of(done: subprocess.CompletedProcess) -> dict[str, int]:
    """Step -> its status, in order."""
    found = re.findall(r"^== ([\w-]+): status (\d+) after", done.stdout, re.MULTILINE)
    return {name: int(status) for name, status in found}


@without_gpu
def test_says_that_there_is_no_gpu(tmp_path):
    done = gpu_check(tmp_path, "first")
    assert done.returncode == 3
    assert (
        "skipped: no GPU" in done.stdout and "skipped: no GPU" in (tmp_path / "log.txt").read_text()
    )


@pytest.mark.parametrize("arguments", [(), ("biuld",), ("first", "second")])
def test_refuses_unknown_stages(tmp_path, arguments):
    done = gpu_check(tmp_path / "out", *arguments, DRY_RUN="1")
    assert done.returncode == 2 and "take first, second, or some of build" in done.stderr
    assert not (tmp_path / "out").exists()


MAX_FILES, NAMES = 8, re.compile(r"[A-Za-z0-9._-]+")  # what a lent machine gives back


@without_gpu
@pytest.mark.slow
def test_both_commands_run_on_a_bare_machine(tmp_path, bare):
    """Everything, small, in one folder; then as files to commit."""
    out, committed = tmp_path / "out", tmp_path / "committed"
    first, second = (gpu_check(out, name, DRY_RUN="1", **bare) for name in ("first", "second"))
    assert [*stages_of(first)] == ["configure", "build", "float8", "graphs", "headline", "tests"]
    operators = ["glu_depthwise", "linear_attention", "segmented_lora"]
    assert [*stages_of(second)] == ["profile", "fused", *operators, "launch", "memcheck"]
    for done in (first, second):
        assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
        assert done.stdout.splitlines()[-1] == "== gpu check: passed"
    files = [path.name for path in out.iterdir()]
    assert len(files) <= MAX_FILES and all(map(NAMES.fullmatch, files))

    command = [sys.executable, "-m", "scripts.gpu_results", str(out), str(committed)]
    subprocess.run(command, check=True, cwd=ROOT)
    names = {f"{name}_cpu.json" for name in (*operators, "step_sana_tiny", "profile_sana_tiny")}
    assert {path.name for path in committed.iterdir()} == names


@without_gpu
def test_a_failed_build_stops_the_run(tmp_path):
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "cmake").write_text("#!/bin/sh\necho no compiler; exit 7\n")
    for name in ("python3", "cmake"):
        (tmp_path / name).chmod(0o755)
    done = gpu_check(tmp_path / "out", "first", DRY_RUN="1", PYTHON=str(tmp_path / "python3"))
    assert done.returncode == 1
    assert stages_of(done) == {"configure": 7}
    assert "no compiler" in done.stdout and "stopped: without a build" in done.stdout


@without_gpu
def test_a_failing_stage_fails_the_run_and_the_next_still_runs(tmp_path):
    done = gpu_check(tmp_path, "memcheck", DRY_RUN="1", MFD_FAST_BACKEND="none")
    assert done.returncode == 1
    assert stages_of(done) == {"launch": 1, "memcheck": 1}


@without_gpu
def test_nothing_starts_after_the_deadline(tmp_path):
    done = gpu_check(tmp_path, "graphs", "profile", DRY_RUN="1", SECONDS_MAX="0")
    assert done.returncode == 1 and stages_of(done) == {
        "float8": 124,
        "graphs": 124,
        "profile": 124,
    }


def test_expected_times_fit_the_two_commands():
    """And every stage may take longer than expected."""
    text = (ROOT / "scripts/gpu_check.sh").read_text()
    steps = re.findall(r"\b(?:run|step) (\S+) (\d+) (\d+) ", text)
    times = {name: (int(expected), int(limit)) for name, expected, limit in steps}
    assert all(expected < limit for expected, limit in times.values())
    operators = 2 * times['"$op"'][0]  # counted once among all
    assert sum(expected for expected, _ in times.values()) + operators < 0.8 * (480 + 365)


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
def test_short_names_of_devices(device, short):
    assert results.short(device) == short


def step_result(rows: dict[tuple[str, str], float], **head: object) -> dict:
    """A result of ``bench.updates.step`` with these seconds by variant and role."""
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


def unpacked(folder: Path, result: dict) -> dict[tuple[str, str], float]:
    """The rows that the committed file has after ``place``."""
    name = "step_sana_1_6b_h100.json"
    (folder / name).write_text(json.dumps(result))
    (folder / "other.json").write_text("{}")
    place(folder, folder / "committed")
    (path,) = (folder / "committed").iterdir()
    assert path.name == name
    rows = json.loads(path.read_text())["rows"]
    return {(row["variant"], row["update"]): row["seconds"] for row in rows}


def test_runs_of_some_variants_make_one_result(tmp_path):
    fused = {("fused", "aux"): 2.0, ("fused", "student"): 3.0}
    assert unpacked(tmp_path, step_result(fused)) == fused
    literal = {("literal", "aux"): 8.0, ("fused", "aux"): 1.0}
    joined = unpacked(tmp_path, step_result(literal))
    assert list(joined.items()) == [
        (("literal", "aux"), 8.0), (("fused", "aux"), 1.0), (("fused", "student"), 3.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"commit": "def"}, {"threads": 2}, {"config": {"model": "sana-1.6b", "step": 0.04}}]
)
def test_results_of_other_work_are_not_joined(tmp_path, change):
    unpacked(tmp_path, step_result({("fused", "aux"): 2.0}))
    new = {("literal", "aux"): 8.0}
    assert unpacked(tmp_path, step_result(new, **change)) == new


# Of what is installed only ALLOWED is found, with what these need and what they ship within.
ALLOWED = ("torch", "triton", "numpy", "safetensors", "nvidia-ml-py", "pytest", "cmake", "ninja")
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
    names = ("scipy", "tyro", "rich")
    assert all(importlib.util.find_spec(name) for name in names), "nothing is tested"
    tries = "\n".join(f"try: import {name}\nexcept ImportError as e: print(e)" for name in names)
    assert python(bare, "-c", tries).stdout == "".join(f"No module named '{n}'\n" for n in names)
    assert python(bare, "-c", "import torch, numpy, safetensors, mfd_fast").returncode == 0


def test_every_operator_is_launched():
    """The script that the sanitizers run, on the CPU; it fails if an operator has no call."""
    command = [sys.executable, "-m", "scripts.launch_every_kernel", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
