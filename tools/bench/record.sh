#!/usr/bin/env bash
# The figures of docs/RESULTS.md that need GPUs, in calls of under ten minutes each.
#   bash tools/bench/record.sh PART OUT
# one, speed, speed-7b, rows, peers, load, base, halos, stream, stream-4m: any GPU of 80 GB (FP8 needs a Hopper; halos and streams 80
# GiB of host memory).
# base-two, doctor, ring, survive-megatron, survive-zero3, tensor: two GPUs of one host.
# node-doctor, node-70b, node-shapes, node-stream, survive-megatron, survive-zero3: all GPUs of a host of four or eight (70B: 260 GiB of
# host memory). Numbers also go to OUT/*.json.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
part=${1:?one of the words above} out=${2:?a folder for the numbers}
mkdir -p "$out"
# NVLink multicast is refused on some hosts; a run without it is slower by little.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONUNBUFFERED=1
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}.
yaml=launch/configs/llama2_70b_32k.yaml failed=0

run() { # limit in seconds, command
  local limit=$1 code=0
  shift
  echo "== $* (at $SECONDS s)"
  timeout -k 20 "$limit" "$@" || { code=$? failed=1; echo "== exit $code"; }
}
alone() { local limit=$1; shift; run "$limit" python3 -W ignore -m "$@"; }
ranks() { local limit=$1 count=$2; shift 2; run "$limit" python3 -W ignore -m torch.distributed.run --standalone --nproc-per-node "$count" -m "$@"; }
two() { local limit=$1; shift; ranks "$limit" 2 "$@"; }
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)

case $part in
  one)
    alone 180 tools.bench.step --tp 8 --steps 5 --family local megatron --json "$out/step.json"
    alone 180 tools.dry_run --config $yaml --steps 2
    run 240 python3 -m pytest -q -m gpu -p no:cacheprovider tests
    ;;
  speed)
    fill=train.gpu_gib=75
    alone 60 tools.dry_run --config $yaml --cap-gib 79 --profile --json "$out/dry_run.json"
    alone 180 tools.bench.step --cp 8 --engine zero3 --offload --layers 20 --recompute pointwise --cap-gib 79 \
      --variant "train.without=[joint_adapters,stream_norm,fused_qkv] parallel.offload.ahead=1" \
      --variant parallel.offload.ahead=1 --variant parallel.offload.ahead=2 --variant parallel.offload.optimizer=cpu \
      --variant train.recompute=full --variant train.recompute=gate_up --variant train.recompute=none \
      --variant train.gate_up=fp8 --variant train.gate_up=host --json "$out/step.json"
    alone 90 tools.bench.step --tp 8 --cap-gib 79 --recompute auto --set $fill --json "$out/step.json"
    alone 90 tools.bench.step --tp 4 --sequence 8192 --attention full --cap-gib 79 --recompute auto --set $fill \
      --set lora.rank=16 --set "train.trainable=[lora]" --json "$out/step.json"
    ;;
  speed-7b)
    fill=train.gpu_gib=75
    alone 200 tools.bench.step --model llama2-7b --cap-gib 79 --recompute auto --set $fill \
      --variant train.gate_up=gpu --variant train.gate_up=host --variant train.gate_up=fp8 \
      --variant "train.gpu_gib=null train.recompute=pointwise train.gate_up=host" --variant "model.base=fp8 train.gate_up=host" \
      --json "$out/step.json"
    alone 60 tools.bench.step --model llama2-7b --engine zero3 --offload --cap-gib 20 --recompute auto --set train.gpu_gib=20 \
      --json "$out/step.json"
    ;;
  rows)
    one=(--cap-gib 79 --recompute auto --set train.gpu_gib=75 --set train.gate_up=host --warmup 1 --json "$out/step.json")
    both=(--variant model.base=bf16 --variant model.base=fp8)
    alone 90 tools.bench.step --model llama2-7b "${one[@]}" "${both[@]}" --sequence 8192 --micro-batch 4
    alone 90 tools.bench.step --model llama2-7b "${one[@]}" "${both[@]}" --sequence 65536 --steps 1
    alone 120 tools.bench.step --model llama2-7b "${one[@]}" "${both[@]}" --sequence 131072 --steps 1
    alone 90 tools.bench.step --model llama2-7b "${one[@]}" "${both[@]}" --attention full
    alone 90 tools.bench.step --model llama3-8b "${one[@]}" "${both[@]}"
    ;;
  peers)
    alone 300 tools.bench.peers --peers s2-liger sdpa-liger --gate-up host gpu --cap-gib 79 --json "$out/peers.json"
    ;;
  load)
    alone 200 tools.bench.load --gb 4 --rounds 1 --json "$out/load.json"
    ;;
  node-doctor)
    doctor() { local processes=$1; shift; alone 70 tools.doctor --config "$@" --device cuda --processes "$processes"; }
    megatron=(--set parallel.engine=megatron --set parallel.offload.params=none)
    doctor "$gpus" $yaml --set "parallel.cp=$gpus"
    doctor "$gpus" $yaml --set "parallel.cp=$gpus" --set parallel.offload.params=none --set model.base=fp8
    doctor "$gpus" $yaml --set parallel.cp=4 --set parallel.offload.optimizer=cpu
    doctor 4 $yaml "${megatron[@]}" --set parallel.cp=4
    doctor 4 $yaml "${megatron[@]}" --set parallel.cp=1 --set parallel.tp=4
    doctor "$gpus" $yaml "${megatron[@]}" --set parallel.cp=2 --set parallel.tp=2
    doctor "$gpus" $yaml "${megatron[@]}" --set "parallel.cp=$((gpus / 4))" --set parallel.tp=2 --set parallel.pp=2 --set parallel.virtual=2
    doctor "$gpus" launch/configs/llama3_8b_1m.yaml --set "parallel.cp=$gpus"
    ;;
  node-70b)
    # All ranks, and the busiest of as many alone: what lies between them is communication.
    node=(tools.bench.step --cp "$gpus" --engine zero3 --offload --recompute auto --set train.gpu_gib=74 --cap-gib 79 --micro-batches 2
      --warmup 1 --steps 2 --variant model.base=bf16 --variant model.base=fp8 --json "$out/step.json")
    ranks 300 "$gpus" "${node[@]}"
    alone 240 "${node[@]}"
    ;;
  node-shapes)
    both=(--recompute auto --set train.gpu_gib=74 --cap-gib 79 --micro-batches 2 --warmup 1 --steps 2 --variant model.base=bf16
      --variant model.base=fp8 --json "$out/step.json")
    ranks 200 "$gpus" tools.bench.step --tp "$gpus" --tile-scale 1 4 "${both[@]}"
    # MLPerf's: 8k, full attention, r 16, adapters alone.
    mlperf=(--tp 4 --sequence 8192 --attention full --set lora.rank=16 --set "train.trainable=[lora]")
    ranks 160 "$gpus" tools.bench.step "${mlperf[@]}" "${both[@]}"
    alone 100 tools.bench.step --tp "$gpus" "${both[@]}"
    alone 80 tools.bench.step "${mlperf[@]}" "${both[@]}"
    ;;
  node-stream)
    long=(--recompute auto --gpu-gib 74 --cap-gib 79 --cp "$gpus" --reference-steps 1 --json "$out/stream.json")
    ranks 320 "$gpus" tools.bench.stream --model llama2-70b --offload --chunk 32768 --lengths 131072 1048576 "${long[@]}"
    ranks 270 "$gpus" tools.bench.stream --chunk $((gpus * 16384)) --reference $((gpus * 32768)) --lengths 1048576 $((gpus * 1048576)) "${long[@]}"
    ;;
  doctor)
    doctor() { alone 90 tools.doctor --config $yaml --device cuda --processes 2 "$@"; }
    megatron=(--set parallel.engine=megatron --set parallel.offload.params=none --set parallel.offload.optimizer=none)
    doctor
    doctor --set parallel.cp=1
    doctor "${megatron[@]}" --set parallel.cp=1 --set parallel.tp=2
    doctor "${megatron[@]}"
    doctor "${megatron[@]}" --set parallel.cp=1 --set parallel.pp=2
    doctor "${megatron[@]}" --set parallel.cp=1 --set parallel.pp=2 --set parallel.virtual=2
    ;;
  base)
    run 60 python3 -m pytest -q -m gpu -p no:cacheprovider tests/numerics/test_quantized_weight.py
    alone 60 tools.bench.products --rows 57344 --columns 8192 --tokens 8192
    alone 60 tools.bench.products --rows 8192 --columns 28672 --tokens 8192
    alone 180 tools.bench.step --cp 8 --engine zero3 --offload --layers 20 --recompute pointwise --cap-gib 79 \
      --variant model.base=bf16 --variant model.base=fp8 --variant model.base=nf4 --json "$out/step.json"
    alone 120 tools.bench.step --cp 8 --engine zero3 --offload --recompute auto --set train.gpu_gib=74 --base fp8 --cap-gib 79 \
      --micro-batches 4 --steps 2 --warmup 1 --profile --json "$out/step.json"
    # The whole model on one GPU; quantizing its random weights is part of the limit.
    whole() {
      alone 120 tools.bench.step "$@" --group 8192 --recompute auto --set train.stream=8192 --set train.gpu_gib=75 \
        --cap-gib 79 --steps 2 --warmup 1 --json "$out/step.json"
    }
    whole --base nf4
    whole --base fp8 --engine zero3 --offload
    ;;
  halos)
    # 70B whole on one GPU, weights and halos from host memory: halos behind the weights of later layers, and before them.
    # About a minute of each variant is the making and quantizing of random weights.
    alone 300 tools.bench.step --base fp8 --engine zero3 --offload --group 8192 --recompute auto --set train.stream=8192 \
      --set train.gpu_gib=75 --cap-gib 79 --warmup 1 --steps 1 \
      --variant "train.without=[early_halos]" --variant "train.without=[]" --json "$out/step.json"
    run 120 python3 -m pytest -q -m gpu -p no:cacheprovider tests/numerics/test_streaming_gpu.py
    ;;
  stream)
    # 8B on one GPU: chunks of 16384, the same with first passes in full, chunks of 32768 with gate and up of most layers in
    # host memory.
    alone 120 tools.bench.stream --lengths 65536 262144 --reference-steps 2 --json "$out/stream.json"
    alone 90 tools.bench.stream --lengths 262144 --without short_first_pass --reference 0 --json "$out/stream.json"
    alone 270 tools.bench.stream --chunk 32768 --recompute auto --gpu-gib 75 --gate-up host --lengths 262144 1048576 \
      --reference-steps 2 --json "$out/stream.json"
    ;;
  stream-4m)
    alone 590 tools.bench.stream --chunk 32768 --recompute auto --gpu-gib 75 --gate-up host --lengths 65536 4194304 \
      --reference-steps 2 --peers s2-liger --peer-lengths 131072 262144 --cap-gib 79 --json "$out/stream.json"
    ;;
  base-two)
    share=(tools.bench.step --cp 2 --sequence 8192 --engine zero3 --offload --layers 12 --recompute pointwise)
    share+=(--micro-batches 2 --variant model.base=fp8 --variant model.base=bf16 --json "$out/step.json")
    two 70 "${share[@]}"
    alone 60 "${share[@]}"
    alone 90 tools.doctor --config $yaml --device cuda --processes 2 --set model.base=fp8 --set parallel.cp=2
    two 120 tools.bench.plan --json "$out/points.yaml" --seconds 90
    ;;
  ring)
    two 460 tools.bench.context --repeats 5 --json "$out/context.json"
    two 90 tools.bench.step --cp 2 --sequence 8192 --attention full --layers 12 --recompute pointwise \
      --variant "train.without=[]" --variant "train.without=[balanced_attention]" --json "$out/step.json"
    ;;
  survive-megatron | survive-zero3)
    engine=${part#survive-} scratch=$(mktemp -d)
    alone 580 tools.bench.survive --processes "$gpus" --engine "$engine" --output "$scratch/$engine" --json "$out/survive.json"
    (cd "$scratch" && tar -czf - "$engine"/*.log) >"$out/$engine-logs.tgz"
    ;;
  tensor)
    alone 100 tools.bench.step --tp 2 --layers 12 --profile --json "$out/step.json"
    two 200 tools.bench.step --tp 2 --layers 12 --tile-scale 1 2 --family local megatron --profile --json "$out/step.json"
    ;;
  *) echo "record: $part is none of the words at the head of this file." >&2; exit 2 ;;
esac
exit $failed
