"""Which code runs for CUDA tensors, and that an update leaves the host alone; without a GPU.

``fake_cuda/trace.py`` says how, in processes of their own.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import mfd_fast  # noqa: F401  (registers the operators)

ROOT = Path(__file__).resolve().parents[2]
FAKE_CUDA = ROOT / "tests/support/fake_cuda"
TORCH = Path(torch.__file__).parent

COMPILED = {
    *("interpolate", "mfd_loss", "ode_step_"),
    *("short_attention", "_short_attention_backward"),
}
TRITON_FIRST = {"glu_depthwise", "_glu_depthwise_backward"}  # docs/lab-notes.md
# model -> variant, with the extension or without
RUNS = {
    "digits": [("fused", ""), ("captured", "compiled")],
    "sana-1.6b": [("fused", "compiled"), ("captured", ""), ("fp8", "")],
    "occfm": [("fused", ""), ("captured", "compiled")],
}
CASES = [(model, *how) for model, ways in RUNS.items() for how in ways]

pytestmark = [
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="is about a PyTorch without CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on the PATH"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """``fake_cuda/device.cpp`` compiled."""
    built = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include"]
    command += [str(FAKE_CUDA / "device.cpp"), "-o", str(built)]
    command += [f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return built


def trace(library: Path, *arguments: str) -> dict[str, dict]:
    """What ``trace.py`` prints, by what it traced."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        "MFD_FAST_BACKEND": "auto",
        "LD_PRELOAD": str(library),
        "MFD_FAST_MULTIPROCESSORS": "132",
    }
    command = [sys.executable, "-W", "ignore", str(FAKE_CUDA / "trace.py")]
    done = subprocess.run(
        [*command, *filter(None, arguments)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def traces(library) -> dict[tuple, dict]:
    """Every case: one process without the extension, one with it."""

    def traced(extension: str) -> dict[tuple, dict]:
        cases = {":".join(case[:2]): case for case in CASES if case[2] == extension}
        found = trace(library, ",".join(cases), extension)
        return {case: found[what] for what, case in cases.items()}

    with ThreadPoolExecutor(2) as pool:
        without, with_it = pool.map(traced, ("", "compiled"))
    return without | with_it


def test_what_the_extension_has():
    texts = "".join(path.read_text() for path in (ROOT / "csrc/bindings").glob("*.cpp"))
    bound = set(re.findall(r'm\.impl\("(_\w+_cuda)"', texts))
    assert bound == {f"_{name.lstrip('_')}_cuda" for name in COMPILED | TRITON_FIRST}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_an_update_leaves_the_host_alone(traces, case):
    assert traces[case]["faults"] == {"aux": [], "student": []}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_an_update_runs_the_kernels_of_a_gpu(traces, case):
    compiled = COMPILED if case[2] else set()
    for name, ran in traces[case]["chosen"].items():
        assert ran == ["compiled" if name in compiled else "triton"], name


def test_every_operator_is_in_one_of_the_updates(traces):
    seen = set().union(*(found["chosen"] for found in traces.values()))
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    registered = {name.removeprefix("mfd_fast::") for name in names if "mfd_fast::" in name}
    # of diffusers' own networks
    others = {"rms_norm_rotary", "_rms_norm_rotary_backward", "renormalised_guidance"}
    assert seen | others == {name for name in registered if not name.endswith("_cuda")}


def test_conditions_are_copied_from_pinned_memory(others):
    faults = others["conditions"]["faults"]
    assert faults == {"digits": [], "cifar10": [], "sana": [], "occfm": []}


@pytest.mark.parametrize(
    ("plant", "fault"),
    {
        "pageable": "_to_copy: copies pageable memory",
        "pageable value": "_to_copy: waits for its copy",
        "waiting": "copy_: waits for its copy",
        "read": "_local_scalar_dense: the host reads a value",
        "decision": "_local_scalar_dense: the host reads a value",
        "to the host": "_to_copy: falls to the host",
        "host operand": "mul: reads a tensor of the host",
        "float64": "_to_copy: float64",
        "float64 in an operator": "rsub: float64",
    }.items(),
)
def test_planted_faults_are_seen(others, plant, fault):
    assert fault in others["planted"]["faults"][plant]


@pytest.fixture(scope="module")
def others(library) -> dict[str, dict]:
    return trace(library, "conditions,planted")
