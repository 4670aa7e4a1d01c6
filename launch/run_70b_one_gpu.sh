#!/usr/bin/env bash
# Llama-2-70B, 4k -> 32k, on one 80 GB GPU, its base in 4 bits; the same command resumes.
#   launch/run_70b_one_gpu.sh [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]     --help says more
name=run_70b_one_gpu
config=launch/configs/llama2_70b_one_gpu.yaml processes=1
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# sbatch runs a copy, in a folder of its own.
[[ -f $here/run.sh ]] || here=${LONGSPAN_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch
[[ -f $here/run.sh ]] || { echo "$name: no $here/run.sh; set LONGSPAN_ROOT to the repository." >&2; exit 2; }
source "$here/run.sh"
