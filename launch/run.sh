#!/usr/bin/env bash
# launch/run.sh CONFIG.yaml [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]     --help says more
# Also sourced by launch/run_*.sh, which set `name` and `config`, and `processes` for another default of --nproc. Runs
# from the root.
set -euo pipefail
processes=${processes:-8} start=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  name=run
  case ${1:-} in
    -h | --help) config=CONFIG.yaml ;;
    "" | -*) echo "run: the first argument is the YAML of a run; --help says more." >&2; exit 2 ;;
    *) config=$1; shift
       # relative to where the user stands
       if [[ $config != /* && -f $start/$config ]]; then config=$start/$config; fi ;;
  esac
fi

usage() {
  local shown=""
  if [[ $name == run ]]; then shown="CONFIG.yaml "; fi
  cat <<TEXT
launch/$name.sh ${shown}[--dry-run | --tiny] [--nproc N] [--device cpu] [--set a.b=c ...]
  trains $config on this machine's GPUs; the same command resumes
  --dry-run    the busiest rank's share of it on the one GPU at hand: memory and tokens/s
  --tiny       the same settings shrunk, on at most four CPU processes: trains, stops, resumes, compares
  --nproc N    processes on each machine (default $processes, one a GPU)
  --device cpu trains on processes without a GPU; nothing is checked before
  --set a.b=c  overrides a setting of the YAML; repeatable
SIGTERM, SIGUSR1 and Ctrl-C save and stop it; a second Ctrl-C ends it at once. Paths in the YAML
and in --set are seen from the repository.
Several machines: start it on each, with NNODES, NODE_RANK and MASTER_ADDR (MASTER_PORT) set, or through
srun --ntasks-per-node=1. NCCL's settings and their reasons are in launch/nccl.env; exported variables win over it.
LONGSPAN_PYTHON names a Python that has everything; otherwise .venv is used.
TEXT
}
refuse() { echo "$name: $*" >&2; exit 2; }

mode=train nproc="" device=() settings=()
while (($#)); do
  case $1 in
    --dry-run | --tiny)
      [[ $mode == train ]] || refuse "--dry-run and --tiny exclude each other; give one."
      mode=${1#--}; shift ;;
    --nproc)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || refuse "--nproc needs a number of processes, got '${2:-}'."
      nproc=$2; shift 2 ;;
    --device)
      [[ ${2:-} == cpu || ${2:-} == cuda ]] || refuse "--device needs cpu or cuda, got '${2:-}'."
      device=(--device "$2"); shift 2 ;;
    --set)
      [[ ${2:-} == *=* ]] || refuse "--set needs section.key=value, got '${2:-}'."
      settings+=(--set "$2"); shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) refuse "unknown argument $1; --help lists what there is." ;;
  esac
done

python=${LONGSPAN_PYTHON:-$PWD/.venv/bin/python}
# Relative to where the user stands; a bare command name is left to PATH.
if [[ $python == */* && $python != /* ]]; then python=$start/$python; fi
command -v "$python" >/dev/null || refuse "$python is not there; run launch/setup.sh, or set LONGSPAN_PYTHON."
common=(--config "$config" ${settings[@]+"${settings[@]}"})

[[ $mode == train || ${#device[@]} == 0 ]] || refuse "--device is for training; --$mode knows what it runs on."
case $mode in
  dry-run) exec "$python" -W ignore -m tools.dry_run "${common[@]}" --nproc "${nproc:-$processes}" ;;
  tiny) exec "$python" -W ignore -m tools.tiny_run "${common[@]}" ${nproc:+--nproc "$nproc"} ;;
esac

# In place of this shell, so that a scheduler's signals go to it. It checks the machine, then starts the processes.
exec "$python" -W ignore -m tools.launch "${common[@]}" --nproc "${nproc:-$processes}" ${device[@]+"${device[@]}"}
