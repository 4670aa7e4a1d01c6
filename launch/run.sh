# Sourced by launch/run_*.sh, which set `name` and `config`: parses the command line and runs it from the root.
# `processes`, if set, is the default of --nproc.
set -euo pipefail
processes=${processes:-8} start=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

usage() {
  cat <<TEXT
launch/$name.sh [--dry-run | --tiny] [--nproc N] [--set a.b=c ...]
  trains $config on this machine's GPUs; the same command resumes
  --dry-run    the busiest rank's share of it on the one GPU at hand: memory and tokens/s
  --tiny       the same settings shrunk, on at most four CPU processes: trains, stops, resumes, compares
  --nproc N    processes on each machine (default $processes, one a GPU)
  --set a.b=c  overrides a setting of the YAML; repeatable
SIGTERM, SIGUSR1 and Ctrl-C save and stop it; a second Ctrl-C ends it at once. Paths in the YAML
and in --set are seen from the repository.
Several machines: start it on each, with NNODES, NODE_RANK and MASTER_ADDR (MASTER_PORT) set, or through
srun --ntasks-per-node=1. LONGSPAN_PYTHON names a Python that has everything; otherwise .venv is used.
TEXT
}
refuse() { echo "$name: $*" >&2; exit 2; }

mode=train nproc="" settings=()
while (($#)); do
  case $1 in
    --dry-run | --tiny)
      [[ $mode == train ]] || refuse "--dry-run and --tiny exclude each other; give one."
      mode=${1#--}; shift ;;
    --nproc)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || refuse "--nproc needs a number of processes, got '${2:-}'."
      nproc=$2; shift 2 ;;
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
python() { command "$python" -W ignore "$@"; }
common=(--config "$config" ${settings[@]+"${settings[@]}"})

case $mode in
  dry-run) exec "$python" -W ignore -m tools.dry_run "${common[@]}" --nproc "${nproc:-$processes}" ;;
  tiny) exec "$python" -W ignore -m tools.tiny_run "${common[@]}" ${nproc:+--nproc "$nproc"} ;;
esac

nproc=${nproc:-$processes}
nodes=${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "NNODES must be a number of machines, 1 or more, got '$nodes'."
node_rank=${NODE_RANK:-}
[[ ${SLURM_LOCALID:-0} == 0 ]] || refuse "srun started it more than once on a machine; use srun --ntasks-per-node=1."
if ((nodes > 1)); then
  # There it would start on the first machine only, and wait for the others.
  if [[ ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} && -z $node_rank ]]; then
    refuse "the job has $nodes machines and this is one of them; start it with srun --ntasks-per-node=1, or set NNODES=1."
  fi
  node_rank=${node_rank:-${SLURM_NODEID:-}}
  [[ $node_rank ]] || refuse "NNODES is $nodes but NODE_RANK is not set; number the machines from 0."
fi
if [[ ! ${node_rank:=0} =~ ^(0|[1-9][0-9]*)$ ]] || ((node_rank >= nodes)); then
  refuse "NODE_RANK must be a number below NNODES, which is $nodes; got '$node_rank'."
fi
if ((nodes > 1)); then
  head=${MASTER_ADDR:-}
  list=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}
  if [[ -z $head && $list ]]; then
    command -v scontrol >/dev/null || refuse "no scontrol here to ask for machine 0 of $list; set MASTER_ADDR to its name."
    head=$(scontrol show hostnames "$list" | head -n 1)
  fi
  [[ $head ]] || refuse "NNODES is $nodes but MASTER_ADDR is not set; give the name of machine 0."
  meet=(--nnodes "$nodes" --node-rank "$node_rank" --master-addr "$head" --master-port "${MASTER_PORT:-29500}")
else
  meet=(--standalone)
fi

python -m tools.preflight "${common[@]}" --nproc "$nproc" --nnodes "$nodes"

# torchrun would give every process one thread, and the optimizer's share in host memory is updated by the CPU.
threads=$(($(nproc) / nproc))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
# Segments that grow leave no gaps between layers' tensors, which the allocator would have to flush to use.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# In place of this shell, so that a scheduler's signals go to it.
exec "$python" -W ignore -m tools.torchrun "${meet[@]}" --nproc-per-node "$nproc" -m pipeline.train "${common[@]}"
