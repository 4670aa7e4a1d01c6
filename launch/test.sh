#!/usr/bin/env bash
# Every check: lint, format, types, import contracts, tests. Arguments go to pytest: launch/test.sh tests/unit -k rope
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -f .venv/.longspan-setup ]]; then
  echo "test: .venv is missing or half made; run launch/setup.sh first." >&2
  exit 1
fi
source .venv/bin/activate

# Two pytest workers, each of one thread: gloo ranks of a test share these cores as well.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

step() {
  echo "== $*"
  "$@"
}
step ruff check .
step ruff format --check .
step mypy
step lint-imports --no-logo
step python -m pytest -n 2 --dist loadfile "$@"
