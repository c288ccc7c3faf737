"""Every CUDA kernel compiles for every supported architecture, without a GPU.

Warnings are errors; nothing may spill, have a stack frame or use local memory.  What ptxas said is
kept under build/cuda-compile, by the hash of everything that the compiler read.
"""

import hashlib
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
HEADERS = sorted([*(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "csrc").glob("*.h")])
ARCHS = ("80", "90a", "100", "120")
FLAGS = [
    *("-std=c++20", "-O3", "-lineinfo", "--threads", "2", "-Icsrc"),
    *("-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-warn-lmem-usage"),
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS),
]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")


@cache
def compiler_and_headers() -> bytes:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    return version + b"".join(path.read_bytes() for path in HEADERS)


def ptxas_log(kernel: str) -> str:
    """What ptxas says about csrc/cuda/<kernel>.cu; an AssertionError if it does not compile."""
    source = ROOT / f"csrc/cuda/{kernel}.cu"
    read = compiler_and_headers() + source.read_bytes() + repr(FLAGS).encode()
    log = ROOT / f"build/cuda-compile/{kernel}-{hashlib.sha256(read).hexdigest()[:16]}.txt"
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", *FLAGS, "-c", str(source), "-o", str(log.with_suffix(".o"))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        log.with_suffix(".o").unlink(missing_ok=True)
        assert done.returncode == 0, done.stdout + done.stderr
        log.write_text(done.stdout + done.stderr)
    return log.read_text()


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(kernel):
    log = ptxas_log(kernel)
    for arch in ARCHS:
        assert f"for 'sm_{arch}'" in log, f"no machine code for sm_{arch}"
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)
    assert used, "ptxas reported no kernel"
    assert set(used) == {("0", "0", "0")}, log
    assert "bytes lmem" not in log, log
