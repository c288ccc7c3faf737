"""Metadata lives in pyproject.toml; this file only hands csrc/ to CMake."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def missing() -> str | None:
    """Why the compiled operators cannot be built here, or None if they can."""
    if os.environ.get("MFD_FAST_NO_EXT") == "1":
        return "MFD_FAST_NO_EXT=1 is set"
    if importlib.util.find_spec("torch") is None:
        return "torch is not visible to the build; install torch, then pip with --no-build-isolation"
    if not shutil.which(os.environ.get("CXX", "c++")):
        return "no C++ compiler was found; install g++ (apt-get install g++) and install again"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path("build") / f"{sys.implementation.cache_tag}-{os.environ.get('MFD_CUDA', 'AUTO')}"
        flags = [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}", f"-DPython_EXECUTABLE={sys.executable}"]
        flags += [f"-D{k}={os.environ[k]}" for k in ("MFD_CUDA", "MFD_CUDA_ARCHS") if k in os.environ]
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", ".", "-B", str(build), *flags])
        subprocess.check_call(["cmake", "--build", str(build)])


reason = missing()
if reason:
    print(f"mfd-fast: installing without compiled operators: {reason}", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("mfd_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
