#!/usr/bin/env bash
# Runs the CPU kernels under AddressSanitizer and UBSan: scripts/sanitize.sh [TEST...]
#
# The compiled module is built once for each instruction set it would choose from, into build/sanitized, and the
# tests given (by default the numerical ones) run over each. Any report ends the run. The CUDA kernels have the same
# as a test, tests/cuda_on_cpu. PYTHON: the interpreter, with fastft's test requirements.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
  tests=(tests/optim/test_adamw_numerics.py tests/optim/test_masks.py tests/optim/test_functional.py tests/nn/test_dropout_kernels.py)
fi
kinds=(cpu)
if [ "$(uname -m)" = x86_64 ]; then
  kinds+=(cpu-baseline)
fi

for kind in "${kinds[@]}"; do
  echo "==> $kind"
  "$python" tests/cuda_on_cpu/sanitized.py "$kind" -q "${tests[@]}"
done
