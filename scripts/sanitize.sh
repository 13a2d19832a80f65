#!/usr/bin/env bash
# Runs the CPU kernels under AddressSanitizer and UBSan: scripts/sanitize.sh [TEST...]
#
# The compiled module is built into build/sanitized, and the tests given (by default the numerical ones) run with the
# loops for each instruction set that this CPU has. Any report ends the run. The CUDA kernels have the same
# as a test, tests/cuda_on_cpu. PYTHON: the interpreter, with fastft's test requirements.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
  tests=(tests/optim/test_adamw_numerics.py tests/optim/test_masks.py tests/optim/test_functional.py tests/nn/test_dropout_kernels.py)
fi
best=$("$python" -c 'from fastft import _C; print(_C.cpu_instruction_set())')
for loops in baseline v3 v4; do
  echo "==> $loops"
  FASTFT_CPU_CAPABILITY=$loops "$python" tests/cuda_on_cpu/sanitized.py cpu -q "${tests[@]}"
  [ "$loops" != "$best" ] || break
done
