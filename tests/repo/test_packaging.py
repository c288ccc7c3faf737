"""sdist and wheel: built from a clean copy, installed elsewhere, used from another folder."""

import shutil
import sys
from pathlib import Path

import pytest
from installed import must, run

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--train.updates", "1", "--train.batch-size", "4", "--distill.aux-updates", "1",
        "--num-eval-samples", "20"]  # fmt: skip


def test_the_sdist_holds_what_is_compiled(sdist):
    def files(folder):
        found = (path for name in ("csrc", "cmake") for path in (folder / name).rglob("*.*"))
        return {str(path.relative_to(folder)) for path in found}

    assert files(sdist) == files(ROOT) and (sdist / "CMakeLists.txt").is_file()


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_what_they_read(installed):
    def files(folder):
        paths = (path for path in (folder / "mfd_fast").rglob("*") if path.is_file())
        return {str(path.relative_to(folder)) for path in paths if path.suffix != ".pyc"}

    kernels = {f"mfd_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    results = {path.name for path in (ROOT / "bench/results").glob("step_*.json")}
    here = {name for name in files(ROOT) if not name.endswith(".so")} | kernels
    assert results
    here |= {f"mfd_fast/cost/results/{name}" for name in results}
    assert "mfd_fast/py.typed" in here and files(installed) == here


@pytest.mark.slow
def test_the_installed_package_distils_digits(installed, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    mfd_fast = [sys.executable, "-m", "mfd_fast"]
    must(run(*mfd_fast, "info", cwd=tmp_path, PYTHONPATH=str(installed)))
    must(run(*mfd_fast, "distill", "digits", "--out", "run", *TINY, cwd=tmp_path,
             PYTHONPATH=str(installed)))  # fmt: skip
    assert (tmp_path / "run/student.safetensors").is_file()


@pytest.mark.slow
def test_the_installed_package_knows_what_was_measured(installed, tmp_path):
    """Estimates take the calibration of a device and family from the package itself."""
    code = (
        "from mfd_fast.cost.measured import RESULTS, calibrated; from mfd_fast.cost import Device; "
        "cpu = Device('AMD EPYC, 2 threads', 1, 1, 1e9, 1e9, 0, 0, is_gpu=False); "
        "print(RESULTS, calibrated(cpu, 'digits')[1].source)"
    )
    said = must(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert str(installed) in said and "step_digits_cpu.json" in said


# What a build says that cannot succeed -------------------------------------------------------


NVCC = """#!/bin/sh
case $1 in --version) echo 'Cuda tools, release {version}, V0';; *) echo '{codes}';; esac
"""


def fake_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, version: str, *known: int) -> Path:
    codes = "\n".join(f"sm_{arch}" for arch in known)
    return fake_program(folder / "nvcc", NVCC.format(version=version, codes=codes))


def fake_torch(folder: Path, version: str, cuda: str | None) -> None:
    """As much of torch as CMakeLists.txt asks for."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text(
        f"class version:\n    cuda = {cuda!r}\n__version__ = {version!r}\n"
    )


def last_words(source: Path, folder: Path, **environment) -> str:
    """The one sentence in which `setup.py build_ext` ends, in a copy of the sdist."""
    tree = folder / "tree"
    shutil.copytree(source, tree)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(*command, cwd=tree, **{"PYTHONPATH": str(folder)} | environment)
    said = done.stderr.strip().splitlines()
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    assert said[-1].startswith("mfd-fast: "), done.stderr
    return said[-1]


def test_a_torch_that_is_too_old(sdist, tmp_path):
    fake_torch(tmp_path, "2.10.0", None)
    said = last_words(sdist, tmp_path)
    assert (
        "torch >= 2.11 is needed" in said and "2.10.0; type: pip install -U 'torch>=2.11'" in said
    )


def test_cuda_wanted_with_a_cpu_build_of_torch(sdist, tmp_path):
    fake_torch(tmp_path, "2.13.0+cpu", None)
    said = last_words(sdist, tmp_path, MFD_CUDA="ON")
    assert "MFD_CUDA=ON needs a CUDA build of torch" in said and "pip install -U torch" in said


@pytest.mark.parametrize(
    ("version", "archs", "message"),
    [
        ("11.8", "", r"nvcc >= 12.0 is needed for C++20, "),
        ("12.4", "90a;120", "nvcc 12.4 cannot build for compute capability 120, it knows 80 90;"),
    ],
)
def test_an_nvcc_that_is_too_old(version, archs, message, sdist, tmp_path):
    fake_torch(tmp_path, "2.11.0+cu124", "12.4")
    nvcc = fake_nvcc(tmp_path, version, 80, 90)
    said = last_words(sdist, tmp_path, CUDACXX=str(nvcc), MFD_CUDA_ARCHS=archs)
    assert message in said and "put a newer CUDA toolkit first on the PATH" in said


@pytest.mark.parametrize("refuses", ["", "csrc/"])
def test_a_compiler_that_fails(refuses, sdist, tmp_path):
    """One that cannot compile anything, and one that does not know what csrc/ needs."""
    text = f'#!/bin/sh\ncase "$*" in *{refuses}*) echo no >&2; exit 1;; esac\nexec c++ "$@"\n'
    said = last_words(
        sdist, tmp_path, CXX=str(fake_program(tmp_path / "cxx", text)), MFD_CUDA="OFF"
    )
    assert "to another C++20 compiler" in said
    assert said.endswith("MFD_FAST_NO_EXT=1 pip install --no-build-isolation .")


def test_setuptools_that_is_too_old(sdist, tmp_path):
    package = tmp_path / "setuptools"
    (package / "command").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '65.5.0'\nExtension = setup = None\n")
    (package / "command/__init__.py").touch()
    (package / "command/build_ext.py").write_text("class build_ext: pass\n")
    said = last_words(sdist, tmp_path)
    assert "setuptools 65.5.0 is older than 77; type: pip install -U 'setuptools>=77'" in said


# What nvcc is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "wanted", "archs"),
    [
        ((75, 80, 86, 90), "", "80;90a;90+PTX"),
        ((80, 90, 100, 103, 110, 120), "", "80;90a;100;120;120+PTX"),
        ((80, 90), "90a", "90a"),
    ],
)
def test_architectures_are_those_that_nvcc_knows(known, wanted, archs, tmp_path):
    nvcc = fake_nvcc(tmp_path, "12.4", *known)
    script = tmp_path / "say.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        f'include({ROOT}/cmake/cuda_archs.cmake)\nmessage(NOTICE "${{archs}}\n${{gencode}}")\n'
    )
    done = run("cmake", f"-DMFD_NVCC={nvcc}", f"-DMFD_CUDA_ARCHS={wanted}", "-P", script, cwd=ROOT)
    must(done)
    said, flags = done.stderr.splitlines()
    assert said == archs
    newest = archs.removesuffix("+PTX").split(";")[-1]
    is_open = f"-gencode=arch=compute_{newest},code=compute_{newest}" in flags
    assert is_open == archs.endswith("+PTX") and "arch=compute_90a,code=sm_90a" in flags
