#!/usr/bin/env bash
# Sourced by the scripts that need nothing prepared (run_tiny.sh, run_sft_tiny.sh), which set `name` and the default
# of `output`: takes --output and --text, sets Python up, and defines `device`, `step` and `bring_model`. Runs from the root.
set -euo pipefail
start=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

usage="usage: launch/$name.sh [--output DIR] [--text DIR]${options:-}     DIR of --text holds train/ and val/ folders of text"
text=launch/demo
while (($#)); do
  case $1 in
    --output | --text)
      [[ ${2:-} ]] || { echo "$name: $1 needs a folder; $usage" >&2; exit 2; }
      folder=$2
      if [[ $folder != /* ]]; then folder=$start/$folder; fi  # relative to where the user stands
      if [[ $1 == --output ]]; then output=$folder; else text=$folder; fi
      shift 2 ;;
    -h | --help) echo "$usage"; exit 0 ;;
    *) echo "$name: unknown argument $1; $usage" >&2; exit 2 ;;
  esac
done
for part in train val; do
  if [[ ! -d $text/$part ]]; then
    echo "$name: $text/$part is not a folder; --text needs train/ and val/ folders of text." >&2; exit 2
  fi
done

# A cluster image may bring its own Python with everything installed; otherwise set up .venv (once).
if [[ -z ${LONGSPAN_PYTHON:-} ]]; then
  bash launch/setup.sh
  LONGSPAN_PYTHON=.venv/bin/python
elif [[ $LONGSPAN_PYTHON == */* && $LONGSPAN_PYTHON != /* ]]; then
  LONGSPAN_PYTHON=$start/$LONGSPAN_PYTHON
fi
python() { command "$LONGSPAN_PYTHON" -W ignore "$@"; }
step() { printf '\n== %s\n' "$*"; }

device=$(python -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')
model=runs/models/SmolLM2-135M
bring_model() {
  local gguf
  gguf=$(python -m tools.fetch_demo)
  [[ -f $model/config.json ]] || python -m tools.import_hf "$gguf" "$model"
}
