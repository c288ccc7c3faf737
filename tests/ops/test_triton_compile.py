"""Every Triton kernel becomes machine code for every supported architecture, without a GPU.

All cases for a Hopper, the two that take most of it of every kernel for the others.

Nothing may spill (a stack frame or local memory in the machine code), and shared memory must fit.
Triton's own cache makes a second run quick.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_launches import LAUNCHERS

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory per block.  Code for 8.0 also runs on 8.6, which has 99 KiB of it.
SHARED_LIMITS = {90: 227 << 10, 80: 99 << 10, 89: 99 << 10, 100: 227 << 10, 120: 99 << 10}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the triton package"
)


def to_machine_code(*arguments: str) -> str:
    """What the script prints, in a process that has no TRITON_INTERPRET."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    script = str(ROOT / "tests/support/triton_to_machine_code.py")
    command = [sys.executable, "-W", "ignore", script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compile_module(module: str) -> list[dict]:
    """The resources of every kernel of the module."""
    text = to_machine_code(",".join(map(str, SHARED_LIMITS)), module)
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def reports(request) -> dict[str, Future]:
    """Two processes at a time over the modules that this run selected."""
    wanted = [
        item.callspec.params["module"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {module: pool.submit(compile_module, module) for module in wanted}


def complaints(row: dict) -> list[str]:
    """What is wrong with one kernel on one architecture."""
    if row["error"]:
        return [row["error"]]
    found = []
    if row["STACK"] or row["LOCAL"]:
        found.append(f"spills: stack {row['STACK']}, local {row['LOCAL']} bytes")
    if row["shared"] > SHARED_LIMITS[row["arch"]]:
        found.append(f"shared memory: {row['shared']} of {SHARED_LIMITS[row['arch']]} bytes")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", LAUNCHERS)
def test_compiles_without_spills(module, reports):
    rows = reports[module].result()
    wrong = [f"{row['case']} sm_{row['arch']}: {why}" for row in rows for why in complaints(row)]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_is_launched():
    texts = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert set(to_machine_code("names").split()) == set(re.findall(r"def (\w+_kernel)\(", texts))
