#!/usr/bin/env bash
# Builds mfd_fast._C with its CUDA kernels against several versions of torch, imports each build and
# runs the tests of operators and graphs on the oldest; needs nvcc, but no GPU.
#
#   scripts/compat_build.sh [VERSION[=VENV]...]        default: 2.11.0 2.12.0 2.14.1, oldest first
#
# VENV is an environment with that CUDA build of torch; without one .venv-compat/VERSION is made
# (some 7 GB each; numpy < 2.3 for Triton 3.6, whose interpreter fails on newer ones).  Objects and
# builds go to build/compat/VERSION, the source tree is left alone.
#
# MFD_CUDA_ARCHS  compute capabilities, default 90a: whether it builds does not depend on them
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
  echo "compat_build: nvcc is not on the PATH; install the CUDA toolkit (13.0 fits torch 2.14)" >&2
  exit 2
fi

environment() {  # VERSION VENV: what is missing there is installed
  [ -x "$2/bin/python" ] || python3 -m venv "$2"
  "$2/bin/python" -c "import torch, triton, numpy, safetensors, cmake, ninja, pytest
assert torch.version.cuda and torch.__version__.split('+')[0] == '$1'" 2>/dev/null ||
    "$2/bin/python" -m pip install --quiet torch=="$1" 'numpy<2.3' safetensors pytest \
      'cmake>=3.25.2' ninja
}

build() {  # VERSION PYTHON SITE: SITE is a copy of the tree with this build inside
  local objects=build/compat/$1/objects
  rm -rf "$3"
  mkdir -p "$3"
  cp -R mfd_fast kernels csrc bench tests pyproject.toml "$3/"  # mfd_fast/kernels is a link
  rm -f "$3"/mfd_fast/*.so
  PATH=$(dirname "$2"):$PATH cmake -G Ninja -S . -B "$objects" -DPython_EXECUTABLE="$2" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/$3/mfd_fast" -DMFD_CUDA=ON -DMFD_WERROR=ON \
    -DMFD_NATIVE=ON -DMFD_CUDA_ARCHS="${MFD_CUDA_ARCHS:-90a}"
  PATH=$(dirname "$2"):$PATH cmake --build "$objects"
  PYTHONPATH=$3 "$2" scripts/check_cuda_build.py
}

tests=(tests/distill/test_graphs.py tests/ops/test_float64.py)  # and those of the operators
for file in mfd_fast/ops/*.py; do
  file=tests/ops/test_$(basename "$file")
  if [ -e "$file" ]; then tests+=("$file"); fi
done

[ $# -gt 0 ] || set -- 2.11.0 2.12.0 2.14.1
versions=()
for item in "$@"; do
  version=${item%%=*}
  venv=.venv-compat/$version
  if [ "$item" != "$version" ]; then venv=${item#*=}; fi
  environment "$version" "$venv"
  python=$(cd "$venv/bin" && pwd)/python
  site=build/compat/$version/site
  build "$version" "$python" "$site"
  if [ ${#versions[@]} -eq 0 ]; then
    oldest=$python
    (cd "$site" && "$python" -m pytest -p no:cacheprovider "${tests[@]}")
  fi
  versions+=("$version")
done
echo "compat: the build of ${versions[-1]}, imported by ${versions[0]}:"
PYTHONPATH=$site "$oldest" scripts/check_cuda_build.py  # one binary serves every version
echo "compat: built and imported with torch ${versions[*]}; tests passed on ${versions[0]}"
