#!/usr/bin/env bash
# Everything that a GPU machine has to say, in two parts of under nine minutes each:
#   bench/run_gpu.sh             the tests that need a GPU, the loss benchmarks at the shapes that have targets
#   bench/run_gpu.sh training    the loader, memory and step time of ImageNet configs, the step's parts, peers
# Results are in bench/results/GPU/DATE/, and a short table comes last. The first part needs torch with CUDA, Triton and
# the extras [test] and [bench]; the second one [train] too, and lightly where it is to be among the peers.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
part=${1:-losses}
case $part in losses | training) ;; *)
    echo "usage: bench/run_gpu.sh [losses | training]" >&2
    exit 2
    ;;
esac
gpu=$("$python" -c '
import re, torch
if torch.cuda.is_available():
    print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
') || exit
if [ -z "$gpu" ]; then
    echo "bench/run_gpu.sh measures an NVIDIA GPU, and torch finds none here; msbreg doctor says what it finds." >&2
    exit 2
fi
out=bench/results/$gpu/$(date +%F)
mkdir -p "$out"
status=0

losses() {
    # Triton's first compilations are part of both; neither may eat the time of the other.
    timeout 230 "$python" -m pytest tests -m gpu 2>&1 | tee "$out/tests.txt" || status=$?
    timeout 290 "$python" -m pytest bench --bench-device cuda --bench-shapes targets --bench-minutes 4 \
        --benchmark-json "$out/losses.json" 2>&1 | tee "$out/losses.txt" || status=$?
    "$python" bench/report.py "$out/losses.json" --out "$out" >/dev/null || status=$?

    echo
    grep -hE '^=+ .*(passed|failed|error|no tests ran).* =+$' "$out/tests.txt" "$out/losses.txt"
    "$python" bench/report.py "$out/losses.json" --short || status=$?
}

# Runs a command for so many seconds at the most, and writes what it prints to a file of the results too.
keep() {
    local seconds=$1 file=$2
    shift 2
    timeout "$seconds" "$python" "$@" 2>&1 | tee -a "$out/$file" || status=$?
}

training() {
    rm -f "$out/training.txt"
    resnet50=(-m msbreg pretrain --dry-run --config imagenet-resnet50-100ep --data.batch_size 256)
    keep 60 training.txt "${resnet50[@]}"
    keep 90 training.txt "${resnet50[@]}" --model.compile true
    keep 60 training.txt "${resnet50[@]}" --data.views 32 --model.view_chunk 4
    keep 50 training.txt -m msbreg bench --config cifar10-resnet18 --optim.name lars
    keep 50 training.txt -m msbreg bench --config cifar10-resnet18 --model.cuda_graph true
    keep 50 training.txt bench/loader.py --rounds 2 --json "$out/loader.json"
    keep 80 training.txt bench/peers.py --seconds 3 --rounds 2 --json "$out/peers-small.json"
    keep 95 training.txt bench/peers.py --case imagenet --seconds 4 --rounds 1 --json "$out/peers-imagenet.json"
    echo
    grep '^|' "$out/training.txt"
}

"$part"
exit "$status"
