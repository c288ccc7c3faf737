#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of less than nine minutes.
#
#   scripts/gpu_check.sh OUT       writes OUT/results.json and OUT/log.txt; a table is printed last
#
# STAGES       which stages to run (default: build test sanitize bench, in this order).  These take
#              a run of their own each, after one with "build":
#                step       whole updates of digits and SANA 1.6B, one switch at a time
#                roofline   the device's copy bandwidth and product rates
#                baseline   the literal diffusers + PEFT loop against ours; skipped without them
#                profile    the digits preset under the profiler
# STEP_MODELS  what "step" measures (default: digits sana-1.6b); STEP_FLAGS is handed to it
# BENCH        which benchmarks, e.g. "interpolate glu_depthwise" (default: all that exist)
# BENCH_FLAGS  handed to each, e.g. --no-compile
# TESTS        what pytest is given besides -m gpu (default: tests)
# PYTHON       a Python with torch >= 2.11, pytest, cmake, ninja, pybind11 (default: python3)
# SECONDS_MAX  stop starting things after this many seconds (default: 525)
# DRY_RUN=1    go on without a GPU, to try this script itself
#
# Exit status: 0 all passed, 1 something failed, 3 skipped because there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: scripts/gpu_check.sh OUT}
python=${PYTHON:-python3}
stages=${STAGES:-build test sanitize bench}
deadline=$((SECONDS + ${SECONDS_MAX:-525}))
for stage in $stages; do
  case $stage in
    build | test | sanitize | bench | step | roofline | baseline | profile) ;;
    *) echo "gpu_check: unknown stage '$stage'; there are build test sanitize bench step roofline" \
      "baseline profile" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

finish() {  # the result, the logs and the table
  for log in "$work"/*.log; do
    [ -e "$log" ] && { echo "==== $(basename "$log" .log)"; tail -c 200000 "$log"; }
  done > "$out/log.txt"
  "$python" scripts/gpu_results.py collect "$work" "$out/results.json"
}

capability=$("$python" -c 'import torch
print("{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none")')
if [ "${capability:-none}" = none ] && [ "${DRY_RUN:-}" != 1 ]; then
  echo "skipped: no GPU (torch.cuda.is_available() is false)" | tee "$work/skipped"
  finish
  exit 3
fi

failed=0
run() {  # NAME LIMIT COMMAND...: at most LIMIT seconds, and not past the deadline
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  if [ $((deadline - SECONDS)) -lt "$limit" ]; then limit=$((deadline - SECONDS)); fi
  if [ "$limit" -lt 5 ]; then
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" > "$work/$name.log" 2>&1 || status=$?
  fi
  [ "$status" -eq 0 ] || failed=1
  echo "$name $status $((SECONDS - begin))" >> "$work/stages.txt"
  echo "== $name: status $status after $((SECONDS - begin)) s"
  if [ "$status" -ne 0 ] && [ -e "$work/$name.log" ]; then tail -n 15 "$work/$name.log"; fi
}

stage_build() {  # for the GPU at hand only; 9.0a is what csrc/cuda is compiled for
  local arch=$capability
  [ "$arch" = 90 ] && arch=90a
  MFD_CUDA=ON MFD_CUDA_ARCHS=$arch run build 200 "$python" setup.py build_ext --inplace
}

stage_test() {
  run test 150 "$python" -m pytest -m gpu -q -p no:cacheprovider ${TESTS:-tests}
}

stage_sanitize() {  # compiled and Triton kernels in turn; the first launch fills Triton's cache
  local launch="$python scripts/launch_every_kernel.py" backend tool
  for backend in cpp triton; do
    export MFD_FAST_BACKEND=$backend
    run "launch-$backend" 60 $launch
    for tool in memcheck racecheck initcheck; do
      # Without torch's cache every tensor is an allocation of its own, with its own bounds.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool-$backend" 60 compute-sanitizer --tool "$tool" \
        --error-exitcode 9 --target-processes application-only $launch
    done
  done
  unset MFD_FAST_BACKEND
}

stage_bench() {
  local file name
  for file in bench/bench_*.py; do
    name=$(basename "$file" .py)
    case " ${BENCH:-${name#bench_}} " in *" ${name#bench_} "*) ;; *) continue ;; esac
    grep -q bench.harness "$file" || continue  # whole updates have stages of their own
    run "$name" 200 "$python" -m "bench.$name" --out "$work/$name.json" ${BENCH_FLAGS:-}
  done
}

stage_step() {
  local model
  for model in ${STEP_MODELS:-digits sana-1.6b}; do
    run "step-$model" 480 "$python" -m bench.bench_step --model "$model" \
      --out "$work/result_step_${model//[-.]/_}.json" ${STEP_FLAGS:-}
  done
}

stage_roofline() {
  run roofline 120 "$python" -m bench.roofline --out "$work/result_roofline.json" ${STEP_FLAGS:-}
}

stage_baseline() {
  if "$python" -c 'import diffusers, peft' 2> /dev/null; then
    run baseline 480 "$python" -m bench.bench_sana --size 1.6b --device cuda \
      --out "$work/result_sana_literal.json"
  else
    echo "== baseline: skipped, diffusers and peft are not installed"
  fi
}

stage_profile() {
  run profile 120 "$python" -c 'import sys
from mfd_fast.cli import main
sys.exit(main(["profile", "digits", "--out", sys.argv[1]]))' "$out/profile"
}

for stage in $stages; do "stage_$stage"; done
finish
exit $failed
