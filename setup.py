"""Metadata lives in pyproject.toml; this file only hands csrc/ to CMake.

Environment: MFD_FAST_NO_EXT=1 leaves the compiled operators out; MFD_CUDA, MFD_CUDA_ARCHS,
MFD_NATIVE and MFD_WERROR are CMakeLists.txt's.  An editable or in-place build, which stays on this
machine, is tuned for its CPU unless MFD_NATIVE=OFF; a wheel is not unless MFD_NATIVE=ON.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TOOLS = "type: pip install -U 'setuptools>=77' 'cmake>=3.25.2' ninja"
FAILED = (
    "mfd-fast: the compiled operators did not build, the first error above says why; set CXX (for "
    "nvcc CUDAHOSTCXX) to another C++20 compiler (g++ 12 is tested) and install again, or go "
    "without those for CUDA or without all: MFD_CUDA=OFF or MFD_FAST_NO_EXT=1 pip install "
    "--no-build-isolation ."
)


def missing() -> str | None:
    """Why the compiled operators cannot be built here, or None if they can."""
    if os.environ.get("MFD_FAST_NO_EXT") == "1":
        return "MFD_FAST_NO_EXT=1 is set"
    if importlib.util.find_spec("torch") is None:
        return "the build does not see torch; install torch, then use pip --no-build-isolation"
    if not shutil.which(os.environ.get("CXX", "c++")):
        return "there is no C++ compiler; install g++ (apt-get install g++) and install again"
    return None


def run(*command: str) -> None:
    """Runs a build tool of this environment; if it fails, the install ends with one sentence."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            raise SystemExit(f"mfd-fast: {tool} is missing; {TOOLS}")
    command = (shutil.which(command[0], path=path), *command[1:])
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, stderr=subprocess.PIPE, text=True, check=False
    )
    reason = re.search(r"mfd-fast: .*?(?=\n\n)", done.stderr, re.DOTALL)
    if done.returncode == 0 or reason is None:
        sys.stderr.write(done.stderr)
    if done.returncode:
        raise SystemExit(" ".join(reason[0].split()) if reason else FAILED)


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.stays_here = self.inplace or self.editable_mode  # the base class clears inplace
        super().run()

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "MFD_CUDA": "AUTO",
            "MFD_CUDA_ARCHS": "",
            "MFD_NATIVE": "ON" if self.stays_here else "OFF",
            "MFD_WERROR": "OFF",
        }
        options |= {name: os.environ[name] for name in options.keys() & os.environ.keys()}
        build = f"build/{sys.implementation.cache_tag}-{options['MFD_CUDA']}"
        flags = [f"-D{name}={value}" for name, value in options.items()]
        flags += [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        run("cmake", "-G", "Ninja", "-S", ".", "-B", build, *flags)
        run("cmake", "--build", build)


if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"mfd-fast: setuptools {setuptools.__version__} is older than 77; {TOOLS}")
if reason := missing():
    print(f"mfd-fast: installing without compiled operators: {reason}", file=sys.stderr)
extensions = [] if reason else [Extension("mfd_fast._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
