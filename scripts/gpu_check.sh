#!/usr/bin/env bash
# What a first quarter of an hour on an NVIDIA GPU should tell, most important first; docs/gpu.md.
#
#   scripts/gpu_check.sh OUT first     build, graphs, headline, tests: at most 480 s
#   scripts/gpu_check.sh OUT second    profile, fused, operators, memcheck: at most 365 s
#   scripts/gpu_check.sh OUT STAGE...  these only
#
# Everything goes straight into OUT, at most eight files: log.txt, and what each stage measured, in
# the form that `python -m scripts.gpu_results OUT bench/results` turns into files to commit.
#
# PYTHON       a Python with torch >= 2.11, triton, numpy, safetensors, pytest, cmake and ninja
#              (default: python3); with pytest-xdist the tests are run in parallel, with diffusers,
#              transformers and peft there is a literal loop, with nvidia-ml-py there are joules
# MFD_WHEELS   a folder of wheels that this Python lacks; they are unpacked for this run only
# MFD_COMMIT   the commit, for the results, where the files are no git repository
# SECONDS_MAX  stop starting things after this many seconds (default: 480, "second": 365)
# DRY_RUN=1    all of it small and on the CPU, to try this script itself
#
# Exit status: 0 all passed, 1 something failed, 2 wrong arguments, 3 there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: scripts/gpu_check.sh OUT first | second | STAGE...}
shift
seconds_max=480
case "$*" in
  first) set -- build graphs headline tests ;;
  second) set -- profile fused operators memcheck; seconds_max=365 ;;
esac
for stage in "${@:-none}"; do
  case $stage in
    build | graphs | headline | tests | profile | fused | operators | memcheck) ;;
    *) echo "gpu_check: unknown stage '$stage'; take first, second, or some of build graphs" \
      "headline tests profile fused operators memcheck" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
deadline=$((SECONDS + ${SECONDS_MAX:-$seconds_max}))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { echo "== $*" | tee -a "$out/log.txt"; }

python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: no ${PYTHON:-python3}" >&2; exit 2; }
PATH=$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin  # cmake, ninja; nvcc
if [ -n "${MFD_WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$MFD_WHEELS"/*.whl || exit 2
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi

dry=${DRY_RUN:-}
arch=$("$python" -c 'import torch
print("{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none")')
if [ "${arch:-none}" = none ] && [ "$dry" != 1 ]; then
  say "skipped: no GPU (torch.cuda.is_available() is false)"
  exit 3
fi
[ "$arch" = 90 ] && arch=90a  # what csrc/cuda is compiled for on a Hopper

failed=0
run() {  # NAME EXPECTED LIMIT COMMAND...: seconds it should take, and may; never past the deadline
  local name=$1 expected=$2 limit=$3 begin=$SECONDS status=0 left=$((deadline - SECONDS))
  shift 3
  [ "$left" -lt "$limit" ] && limit=$left
  say "$name: about $expected s, at most $limit s"
  if [ "$limit" -lt 5 ]; then
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" >> "$out/log.txt" 2>&1 || status=$?
  fi
  [ "$status" -eq 0 ] || failed=1
  say "$name: status $status after $((SECONDS - begin)) s"
  [ "$status" -eq 0 ] || tail -n 15 "$out/log.txt"
  return "$status"
}

# What differs in a dry run: the device, and how much there is to do.
on="--device cuda" model=sana_1_6b preset=sana_1_6b built=$PWD/mfd_fast
headline="literal|literal regional|captured"
cuda=(-DMFD_CUDA=ON "-DMFD_CUDA_ARCHS=$arch") only_say=()
graphs=(-m gpu tests/distill/test_graphs.py) first=(-m gpu tests/backbones/test_float8.py)
# Only files with a test for a GPU: others may import what this machine lacks.
mapfile -t on_gpu < <(grep -rlE 'mark\.gpu|triton_device|def test_.*\bdevice\b' tests \
  --include='test_*.py' | grep -vE '^tests/repo/|test_graphs|test_float8' | sort)
tests=(-m gpu "${on_gpu[@]}")
kept="--repeats 3" operators=(--no-compile --only "x3.* bfloat16")
if [ "$dry" = 1 ]; then
  on="--device cpu" model=sana_tiny preset=sana_tiny built=$work
  headline="literal|fused"
  cuda=(-DMFD_CUDA=OFF) only_say=(-- -n)  # ninja says what it would compile
  graphs+=(--collect-only) tests+=(--collect-only)  # what a GPU would run can be imported here
  first=(tests/backbones/test_float8.py -k product)
  kept=--smoke operators=(--smoke)
fi

stage_build() {  # for this GPU only; nothing else makes sense without it
  run configure 10 60 cmake -G Ninja -S . -B build/gpu-check "${cuda[@]}" \
    "-DPython_EXECUTABLE=$python" "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$built" &&
    run build 40 150 cmake --build build/gpu-check "${only_say[@]}" && return
  say "stopped: without a build the rest says nothing"
  exit 1
}

stage_graphs() {  # a capture that fails spoils its process, so they have one of their own
  run float8 10 60 "$python" -m pytest -q -p no:cacheprovider "${first[@]}"
  run graphs 40 100 "$python" -m pytest -q -p no:cacheprovider "${graphs[@]}"
}

step() {  # NAME EXPECTED LIMIT VARIANTS: cycles an hour, memory, launches, waits
  run "$1" "$2" "$3" "$python" -m bench "step_$model" $on $kept --only "$4" --out "$out"
}

stage_headline() { step headline 190 280 "^($headline)\$"; }
stage_fused() { step fused 110 150 '^(fused|fp8)$'; }

stage_tests() {
  local workers=()
  "$python" -c 'import xdist' 2> /dev/null && [ "$dry" != 1 ] && workers=(-n auto)
  run tests 110 240 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "${tests[@]}"
}

stage_profile() {
  run profile 60 120 "$python" -m bench "profile_$preset" $on --repeats 1 --out "$out"
}

stage_operators() {
  local op
  for op in glu_depthwise linear_attention segmented_lora; do
    run "$op" 14 60 "$python" -m bench "$op" $on "${operators[@]}" --out "$out"
  done
}

stage_memcheck() {  # without torch's cache every tensor has bounds of its own
  local launch=("$python" -m scripts.launch_every_kernel $on) tool=()
  [ "$dry" = 1 ] || tool=(compute-sanitizer --tool memcheck --error-exitcode 9)
  run launch 15 60 "${launch[@]}"  # fills Triton's cache
  run memcheck 45 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool[@]}" "${launch[@]}"
}

for stage in "$@"; do "stage_$stage"; done
"$python" -m scripts.gpu_results "$out" | tee -a "$out/log.txt"
[ "$failed" = 0 ] && say "gpu check: passed" || say "gpu check: failed"
exit $failed
