#!/usr/bin/env bash
# Llama-2-70B, 4k -> 32k, on one machine of eight 80 GB GPUs; the same command resumes.
#   launch/run_70b_32k.sh [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]     --help says more
name=run_70b_32k
config=launch/configs/llama2_70b_32k.yaml
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
