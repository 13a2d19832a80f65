#!/usr/bin/env bash
# Runs the CPU kernels under AddressSanitizer and UBSan: scripts/sanitize.sh [TEST...]
#
# The compiled module is built once, into build/sanitized. The tests given run over it with the loops for each
# instruction set that this CPU has, side by side. By default: every loop of AdamW, and the numerical tests with one
# case for each value of each axis (tests/one_per_axis.py). Any report fails the run. The CUDA kernels have the same as
# a test, tests/cuda_on_cpu. PYTHON: the interpreter, with fastft's test requirements.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
tests=("$@") left_out=()
if [ ${#tests[@]} -eq 0 ]; then
  left_out=("not test_a_few_steps") # the fifty steps in short
  tests=(
    --one-per-axis tests/cuda_on_cpu/every_loop.py tests/optim/test_adamw_numerics.py tests/optim/test_masks.py
    tests/optim/test_functional.py tests/optim/test_low_precision_loops.py tests/nn/test_dropout_kernels.py
  )
fi
best=$("$python" -c 'from fastft import _C; print(_C.cpu_instruction_set())')
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$logs"' EXIT

declare -A running
for loops in baseline v3 v4; do
  selection=("${left_out[@]}")
  # Three such tensors at once would not fit into memory.
  [ "$loops" == "$best" ] || selection+=("not test_more_elements_than_32_bits_count")
  chosen=()
  if [ ${#selection[@]} -gt 0 ]; then
    joined=$(printf ' and %s' "${selection[@]}")
    chosen=(-k "${joined# and }")
  fi
  # The first to come builds; the others wait for it.
  FASTFT_CPU_CAPABILITY=$loops "$python" tests/cuda_on_cpu/sanitized.py cpu -q "${chosen[@]}" "${tests[@]}" \
    >"$logs/$loops" 2>&1 &
  running[$loops]=$!
  [ "$loops" != "$best" ] || break
done
failed=0
for loops in baseline v3 v4; do
  [ -n "${running[$loops]-}" ] || continue
  wait "${running[$loops]}" || failed=1
  echo "==> $loops"
  cat "$logs/$loops"
done
exit "$failed"
