#!/usr/bin/env bash
# Llama-2-7B, 4k -> 100k, on one machine of eight 80 GB GPUs; the same command resumes.
#   launch/run_7b_100k.sh [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]     --help says more
name=run_7b_100k
config=launch/configs/llama2_7b_100k.yaml
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
