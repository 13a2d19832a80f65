#!/usr/bin/env bash
# What a machine with an NVIDIA GPU must show, in 8 minutes and 40 lines: scripts/gpu_check.sh FOLDER [--dry-run]
#
# Needs Python >= 3.11, nvcc, a CUDA build of torch, pybind11, ninja, setuptools and pytest; no network. Builds from
# source for this GPU alone, runs the CUDA tests, compute-sanitizer over small cases, and the benchmark's CUDA cases.
# Full logs and bench.json go to FOLDER. Fails if anything failed. PYTHON: the interpreter.
# --dry-run needs no GPU: it builds for Hopper, only collects the CUDA tests, and runs all else on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
logs=${1:?usage: scripts/gpu_check.sh FOLDER [--dry-run]}
dry=${2-}
[[ -z $dry || $dry == --dry-run ]] || {
  echo "usage: scripts/gpu_check.sh FOLDER [--dry-run]; got $dry"
  exit 2
}
mkdir -p "$logs" || exit
logs=$(cd "$logs" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PIP_DISABLE_PIP_VERSION_CHECK=1
FASTFT_COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
export FASTFT_COMMIT

if [ -n "$dry" ]; then
  arch=90 device=cpu patience=10 collect=(--collect-only) cases=(--case plain --case frozen_tensors_90)
else
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>"$logs/gpu.log") || {
    echo "no GPU that torch can use: $(tail -n 1 "$logs/gpu.log")"
    exit 1
  }
  device=cuda patience=1 collect=() cases=(
    --case step --case tensors --case groups_100 --case 'frozen_tensors_*' --case 'masked_rows_*'
    --case 'size_100m_*' --case dropout
  )
fi

table=()
failed=0
# check NAME SECONDS COMMAND...: runs it with its output in FOLDER/NAME.log, and adds a row to the table.
check() {
  local name=$1 limit=$2 begin=$SECONDS result=passed
  shift 2
  timeout $((limit * patience)) "$@" >"$logs/$name.log" 2>&1 || {
    result=FAILED
    failed=1
  }
  table+=("$(printf '%-10s %-7s %4d s  %s' "$name" "$result" $((SECONDS - begin)) "$(tail -n 1 "$logs/$name.log" | cut -c1-90)")")
}

check build 90 env FASTFT_CUDA=1 FASTFT_CUDA_ARCHS="$arch" \
  "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$site" .
# -P: not the source tree, whose fastft/ holds no compiled module.
check info 30 "$python" -P -m fastft info
check tests 150 "$python" -P -m pytest -q -m cuda "${collect[@]}" tests/test_cuda*.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
for tool in memcheck racecheck; do
  if [ -n "$dry" ]; then
    check "$tool" 45 "$python" -P scripts/gpu_small_case.py "$device"
  elif [ -n "$sanitizer" ]; then
    check "$tool" 45 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -P scripts/gpu_small_case.py
  else
    table+=("$tool  not run: no compute-sanitizer")
    failed=1
  fi
done
check bench 110 "$python" -P -m fastft bench --quick --device "$device" --json "$logs/bench.json" "${cases[@]}"

printf '%s\n' "${table[@]}"
"$python" - "$logs/bench.json" <<'PYTHON'
import json
import sys

try:
    result = json.load(open(sys.argv[1], encoding="utf-8"))
except OSError as error:
    sys.exit(f"no results: {error}")
print("%s, a copy runs at %.0f GB/s; fastft's time over the other's, and its share of the copy" % (
    result["environment"]["device"], result["copy_gb_per_s"]))
headline = ("tensors_5000", "groups_100", "frozen_tensors_90", "masked_rows_90")
for name, case in result["cases"].items():
    if case["family"] in ("step", "size", "dropout") or name in headline:
        other, against = next(iter(case["against"].items()))
        share = case["gb_per_s"] and f"{100 * case['gb_per_s'] / result['copy_gb_per_s']:.0f} %"
        print(f"{name:<38} {case['median_ms']:>9.4g} ms {against['ratio_of_medians']:>6.3f} of {other:<18} {share or ''}")
PYTHON
exit "$failed"
