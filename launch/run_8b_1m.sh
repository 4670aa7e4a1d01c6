#!/usr/bin/env bash
# Llama-3-8B, 8k -> 1M, on one 80 GB GPU; the same command resumes.
#   launch/run_8b_1m.sh [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]     --help says more
name=run_8b_1m
config=launch/configs/llama3_8b_1m.yaml processes=1
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "$name: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
source "$here/run.sh"
