#!/usr/bin/env bash
# Llama-2-13B, 4k -> 64k, on one machine of eight 80 GB GPUs; the same command resumes.
#   launch/run_13b_64k.sh [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]     --help says more
name=run_13b_64k
config=launch/configs/llama2_13b_64k.yaml
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
