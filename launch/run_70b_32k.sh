#!/usr/bin/env bash
# Llama-2-70B, 4k -> 32k, on one machine of eight 80 GB GPUs; the same command resumes.
#   launch/run_70b_32k.sh [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]     --help says more
name=run_70b_32k
config=launch/configs/llama2_70b_32k.yaml
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "$name: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
source "$here/run.sh"
