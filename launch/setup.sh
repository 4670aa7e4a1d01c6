#!/usr/bin/env bash
# Make .venv with everything Longspan needs, from nothing but a Python >= 3.12. Safe to run again: does nothing when done.
#   launch/setup.sh [--venv DIR] [--python PATH]
set -euo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
chosen=""
usage="usage: launch/setup.sh [--venv DIR] [--python PATH]"
while (($#)); do
  case "$1" in
    --venv | --python)
      if [[ $# -lt 2 || -z "$2" ]]; then
        echo "setup: $1 needs a value; $usage" >&2
        exit 2
      fi
      path=$2
      # Relative to where the user stands; a bare command name is left to PATH.
      if [[ "$path" != /* && ("$1" == --venv || "$path" == */*) ]]; then path=$start/$path; fi
      if [[ "$1" == --venv ]]; then venv=$path; else chosen=$path; fi
      shift 2
      ;;
    -h | --help)
      echo "$usage"
      exit 0
      ;;
    *)
      echo "setup: unknown option $1; $usage" >&2
      exit 2
      ;;
  esac
done

# The stamp says which declarations the environment was made from; an interrupted run leaves none.
stamp="$venv/.longspan-setup"
wanted=$(cat setup.cfg pyproject.toml constraints.txt launch/setup.sh | cksum)" $PWD"
if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" && -x "$venv/bin/python" ]]; then
  echo "setup: $venv is up to date."
  exit 0
fi

# A candidate counts only if it runs: pyenv's shims exist on PATH for versions that are not selected, and then fail. It must
# also be able to make environments (Debian splits that into python3-venv).
works() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
  local name root version
  for name in python3.12 python3.13 python3 python; do
    type -aP "$name" 2>/dev/null || true
  done
  root=${PYENV_ROOT:-$HOME/.pyenv}
  if command -v pyenv >/dev/null 2>&1; then
    root=$(pyenv root 2>/dev/null) || root=${PYENV_ROOT:-$HOME/.pyenv}
  fi
  for version in 3.12 3.13; do
    # Newest patch release first.
    find "$root/versions" -maxdepth 1 -name "$version.*" 2>/dev/null | sort -rV | sed 's|$|/bin/python|' || true
  done
  printf '%s\n' "$HOME/.local/bin/python3.12" "$HOME/.local/bin/python3.13"
  if command -v uv >/dev/null 2>&1; then
    uv python find --no-project '>=3.12' 2>/dev/null || true
  fi
}

find_python() {
  local candidate
  while IFS= read -r candidate; do
    if works "$candidate"; then
      echo "$candidate"
      return 0
    fi
  done < <(candidates)
  return 1
}

if [[ -n "$chosen" ]]; then
  python=$chosen
  if ! works "$python"; then
    echo "setup: $python is not a working Python >= 3.12 with venv; give another one to --python." >&2
    exit 1
  fi
elif ! python=$(find_python); then
  cat >&2 <<'MESSAGE'
setup: no working Python >= 3.12 with the venv module was found (looked on PATH, in pyenv and in uv). Install one, e.g.
  Debian/Ubuntu:  sudo apt-get install python3.12 python3.12-venv
  pyenv:          pyenv install 3.12
  uv:             uv python install 3.12
and run launch/setup.sh again, or name it with --python PATH.
MESSAGE
  exit 1
fi

# An environment of another, or a vanished, Python cannot be mended in place. Only what venv made is ever removed.
if [[ -e "$venv" ]] && ! works "$venv/bin/python"; then
  if [[ ! -f "$venv/pyvenv.cfg" && -n "$(ls -A "$venv")" ]]; then
    echo "setup: $venv exists and is not a Python environment; move it away, or choose another with --venv." >&2
    exit 1
  fi
  rm -rf "$venv"
fi
rm -f "$stamp"
if [[ ! -x "$venv/bin/python" ]]; then
  echo "setup: making $venv with $python ($("$python" --version))"
  "$python" -m venv "$venv"
fi

retry() {
  local attempt
  for attempt in 1 2 3; do
    if "$@"; then
      return 0
    fi
    if ((attempt < 3)); then
      echo "setup: attempt $attempt failed; again in $((attempt * 5)) s (what was downloaded is kept)." >&2
      sleep $((attempt * 5))
    fi
  done
  echo "setup: pip failed three times, see its message above; check the network (and free disk, about 8 GB), and rerun." >&2
  return 1
}

export PIP_DISABLE_PIP_VERSION_CHECK=1
# deepspeed is built from source: without its CUDA operators, none of which Longspan uses.
export DS_BUILD_OPS=0
# setuptools is pinned too: the package itself is built with it, not with a fresh download (--no-build-isolation).
retry "$venv/bin/python" -m pip install --quiet --constraint constraints.txt pip setuptools
echo "setup: installing (torch and its CUDA libraries are about 3 GB; the wheel serves CPUs too)"
retry "$venv/bin/python" -m pip install --progress-bar off --quiet --constraint constraints.txt \
  --no-build-isolation --editable '.[dev]'
"$venv/bin/python" -m pip check
"$venv/bin/python" -c 'import torch, transformers, pipeline.config.run; print("setup: torch", torch.__version__, "ready")'
echo "$wanted" >"$stamp"
echo "setup: done; source $venv/bin/activate, then longspan --help; or launch/test.sh"
