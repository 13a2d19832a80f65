#!/usr/bin/env bash
# One wheel, built once, under several versions of torch: scripts/check_torch_versions.sh WHEEL VERSION...
#
# Each VERSION ("2.10.*", "2.13.0"; "" is the newest) gets an environment of its own, in which the wheel is installed and
# scripts/install_test.py run. A CUDA build of torch is gigabytes, which are gone again afterwards. PYTHON: the
# interpreter, of the version that the wheel was built for.
set -euo pipefail
wheel=$(realpath "${1:?usage: scripts/check_torch_versions.sh WHEEL VERSION...}")
shift
[ $# -gt 0 ] || { echo "expected at least one version of torch" >&2; exit 2; }
test=$(realpath "$(dirname "$0")/install_test.py")
for version in "$@"; do
  environment=$(mktemp -d)
  trap 'rm -rf "$environment"' EXIT
  printf '\n==> torch %s\n' "${version:-newest}"
  "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --no-cache-dir "torch${version:+==$version}"
  "$environment/bin/python" -m pip install --quiet "$wheel"
  (cd / && "$environment/bin/fastft" info && "$environment/bin/python" "$test")
  rm -rf "$environment"
done
