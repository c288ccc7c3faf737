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
        return "the build does not see torch; install torch, then use pip --no-build-isolation"
    if not shutil.which(os.environ.get("CXX", "c++")):
        return "there is no C++ compiler; install g++ (apt-get install g++) and install again"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = f"build/{sys.implementation.cache_tag}-{os.environ.get('MFD_CUDA', 'AUTO')}"
        flags = [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}", f"-DPython_EXECUTABLE={sys.executable}"]
        passed_on = {"MFD_CUDA", "MFD_CUDA_ARCHS", "MFD_NATIVE"} & set(os.environ)
        flags += [f"-D{name}={os.environ[name]}" for name in sorted(passed_on)]
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", ".", "-B", build, *flags])
        subprocess.check_call(["cmake", "--build", build])


if reason := missing():
    print(f"mfd-fast: installing without compiled operators: {reason}", file=sys.stderr)
extensions = [] if reason else [Extension("mfd_fast._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
