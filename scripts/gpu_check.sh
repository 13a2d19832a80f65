#!/usr/bin/env bash
# What a machine with an NVIDIA GPU must show: scripts/gpu_check.sh LOGDIR
#
# Needs Python >= 3.11, nvcc, a CUDA build of torch, pybind11, ninja, setuptools and pytest; no network. Builds from source, runs the CUDA tests, compute-sanitizer on a small case and
# the benchmarks, and ends with a short table. Full logs go to LOGDIR. Fails if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${1:?usage: scripts/gpu_check.sh LOGDIR}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PIP_DISABLE_PIP_VERSION_CHECK=1

table=()
failed=0
# check NAME COMMAND...: runs it with its output in LOGDIR/NAME.log, and adds a row to the table.
check() {
  local name=$1 begin=$SECONDS result=passed
  shift
  "$@" >"$logs/$name.log" 2>&1 || { result=FAILED; failed=1; }
  table+=("$(printf '%-12s %-7s %4d s  %s' "$name" "$result" $((SECONDS - begin)) "$(tail -n 1 "$logs/$name.log" | cut -c1-80)")")
}

check build env FASTFT_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$site" .
# -P: not the source tree, whose fastft/ holds no compiled module.
check info "$python" -P -m fastft.cli info
check tests timeout 240 "$python" -P -m pytest -q -m cuda tests/test_cuda*.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    check "$tool" timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" scripts/gpu_small_case.py
  done
else
  table+=("memcheck     not run: no compute-sanitizer on PATH")
fi
check bench timeout 150 "$python" benchmarks/run.py --quick --device cuda --output "$logs/bench.json"

printf '%s\n' "${table[@]}"
tail -n 24 "$logs/bench.log"
exit "$failed"
