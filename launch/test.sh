#!/usr/bin/env bash
# Every check: lint, format, shell scripts, types, import contracts, tests. Arguments go to pytest: launch/test.sh tests/unit -k rope
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
# What it leaves out, and why, is in .shellcheckrc.
step shellcheck launch/*.sh launch/slurm.sbatch tools/bench/record.sh .ci/manifests .ci/release .ci/run
step mypy
step lint-imports --no-logo

# Of what this process and its workers run; ranks and commands in processes of their own are not counted.
covered=()
if (($# == 0)); then
  covered=(--cov=pipeline --cov=parallel --cov=tools --cov-report=)
  export COVERAGE_CORE=sysmon COVERAGE_FILE=${TMPDIR:-/tmp}/longspan-coverage.$$
  trap 'rm -f "$COVERAGE_FILE"*' EXIT
fi

chosen=0
tests() {
  local code=0
  step python -m pytest "$@" || code=$?
  # 5: the arguments chose no test of this part.
  case $code in 0) chosen=1 ;; 5) ;; *) exit "$code" ;; esac
}
# Files as tests/conftest.py orders them, the longest first: xdist would take those of most tests first.
tests -m "not crowd" -n 2 --dist loadfile --no-loadscope-reorder ${covered[@]+"${covered[@]}"} "$@"
# Tests of up to eight busy processes come last and alone: beside them, whatever waits for a process to start or to end
# within its time waits in vain.
tests -m crowd ${covered[@]+"${covered[@]}" --cov-append} "$@"
if ((!chosen)); then
  echo "test: the arguments chose no test." >&2
  exit 5
fi
if ((${#covered[@]})); then
  echo "== coverage, % of lines: $(coverage report --format=total)"
fi
