#!/usr/bin/env bash
# Builds mfd_fast._C with its CUDA kernels and imports it; no GPU is needed.
#
#   scripts/cuda_build.sh            into build/cuda, with the venv .venv-cuda (made if missing)
#
# MFD_CUDA_VENV   another venv; torch==2.14.1 of the default index (a CUDA build) is installed into it
# MFD_CUDA_ARCHS  compute capabilities, default as in CMakeLists.txt: 80;90a;100;120
# The CPU build in the source tree is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${MFD_CUDA_VENV:-.venv-cuda}
python=$venv/bin/python
if [ ! -x "$python" ]; then python3 -m venv "$venv"; fi
if ! "$python" -c 'import torch, cmake, ninja; assert torch.version.cuda' 2>/dev/null; then
  "$python" -m pip install --quiet torch==2.14.1 numpy safetensors cmake ninja setuptools
fi
export PATH="$(cd "$venv/bin" && pwd):$PATH"

# nvcc may be a wrapper; what it reports as TOP is the toolkit that it really runs.
if ! command -v nvcc >/dev/null; then
  echo "cuda_build: nvcc is not on the PATH; install the CUDA toolkit (13.0 fits torch 2.14)" >&2
  exit 2
fi
top=$(nvcc --dryrun -x cu /dev/null -c -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
CUDA_HOME=$(cd "$top" && pwd)
export CUDA_HOME CUDACXX=$CUDA_HOME/bin/nvcc

build=build/cuda
site=$build/site
rm -rf "$site"
mkdir -p "$site"
cp -RL mfd_fast "$site/"  # kernels/ is behind the link mfd_fast/kernels
find "$site" -name '*.so' -delete
cmake -G Ninja -S . -B "$build/objects" -DMFD_CUDA=ON -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/$site/mfd_fast" \
  ${MFD_CUDA_ARCHS:+"-DMFD_CUDA_ARCHS=$MFD_CUDA_ARCHS"}
cmake --build "$build/objects"
PYTHONPATH=$site python scripts/check_cuda_build.py
