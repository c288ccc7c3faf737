#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in runs of less than nine minutes.
#
#   scripts/gpu_check.sh OUT       writes OUT/results.json and OUT/log.txt; a table is printed last
#   python scripts/gpu_results.py unpack OUT/results.json bench/results   # files to commit
#
# STAGES       which stages to run, in this order (default: build test sanitize bench).  "build"
#              comes first on a fresh machine; these take a run of their own each:
#                step       whole updates of digits and SANA 1.6B, one switch at a time
#                time       seconds predicted from what "step" left in bench/results, and measured
#                memory     bytes predicted and measured
#                occfm      OccFM's network and decoder against the reference
#                estimate   a cycle of SANA 1.6B by phase, predicted and measured
#                profile    digits and SANA 1.6B under the profiler
#                roofline   the device's copy bandwidth and product rates
#                baseline   the literal diffusers + PEFT loop against ours; skipped without them
# BENCH        which operators, e.g. "interpolate glu_depthwise" (default: all)
# STEP_MODELS, ESTIMATE_PRESETS, PROFILE_PRESETS  which models
# BENCH_FLAGS, STEP_FLAGS, TIME_FLAGS, MEMORY_FLAGS, OCCFM_FLAGS, ESTIMATE_FLAGS, PROFILE_FLAGS,
# ROOFLINE_FLAGS, BASELINE_FLAGS  handed to the module of that stage.  A model whose variants do not
#              fit in one run takes several, STEP_FLAGS="--only REGEX": unpack joins their rows.
# TESTS        what pytest is given besides -m gpu (default: tests)
# PYTHON       a Python with torch >= 2.11, triton, numpy, safetensors, pytest, setuptools, cmake and
#              ninja (default: python3); with nvidia-ml-py there are joules, with diffusers,
#              transformers and peft the loops that need them
# MFD_COMMIT   the commit, for the results, where the files are no git repository
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
    build | test | sanitize | bench | step | time | memory | occfm | estimate | profile) ;;
    roofline | baseline) ;;
    *) echo "gpu_check: unknown stage '$stage'; there are build test sanitize bench step time" \
      "memory occfm estimate profile roofline baseline" >&2; exit 2 ;;
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
    grep -qF 'main(OP, cases)' "$file" || continue  # what is no operator has a stage of its own
    run "$name" 200 "$python" -m "bench.$name" --out "$work/$name.json" ${BENCH_FLAGS:-}
  done
}

measure() {  # NAME LIMIT MODULE ARGUMENTS...: a benchmark whose result is kept
  local name=$1 limit=$2 module=$3
  shift 3
  run "$name" "$limit" "$python" -m "bench.$module" "$@" --out "$work/result_${name//[-.]/_}.json"
}

stage_step() {
  local model
  for model in ${STEP_MODELS:-digits sana-1.6b}; do
    measure "step-$model" 480 bench_step --model "$model" ${STEP_FLAGS:-}
  done
}

stage_time() {  # "step" of the same run first: predictions are made from bench/results
  if [ "${DRY_RUN:-}" != 1 ]; then
    "$python" scripts/gpu_results.py place "$work" bench/results
  fi
  measure predicted_time 480 predicted_time ${TIME_FLAGS:---device cuda}
}

stage_memory() { measure predicted_memory 300 predicted_memory ${MEMORY_FLAGS:---device cuda}; }

stage_occfm() {
  measure occfm_network 300 bench_occfm ${OCCFM_FLAGS:-}
  measure occfm_decoder 200 bench_occfm_decoder ${OCCFM_FLAGS:-}
}

stage_estimate() {
  local preset
  for preset in ${ESTIMATE_PRESETS:-sana-1.6b}; do
    measure "estimate-$preset" 300 cycles estimate "$preset" ${ESTIMATE_FLAGS:-}
  done
}

stage_profile() {
  local preset
  for preset in ${PROFILE_PRESETS:-digits sana-1.6b}; do
    measure "profile-$preset" 300 cycles profile "$preset" ${PROFILE_FLAGS:-} \
      --trace "$out/profile-$preset.json.gz"
  done
}

stage_roofline() { measure roofline 120 roofline ${ROOFLINE_FLAGS:-}; }

stage_baseline() {
  if "$python" -c 'import diffusers, peft' 2> /dev/null; then
    measure sana_literal 480 bench_sana ${BASELINE_FLAGS:---size 1.6b --device cuda}
  else
    echo "== baseline: skipped, diffusers and peft are not installed"
  fi
}

for stage in $stages; do "stage_$stage"; done
finish
exit $failed
