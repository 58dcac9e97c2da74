#!/usr/bin/env bash
# Everything that a GPU machine has to say, in six parts of under nine minutes each:
#   bench/run_gpu.sh               the tests that need a GPU, the loss benchmarks at the shapes that have targets; options
#                                  after `losses` are the benchmarks', such as --bench-minutes 2
#   bench/run_gpu.sh training      memory and step time of every config; of ResNet-50 also compiled, and with 32 views
#   bench/run_gpu.sh loader        the loader against torchvision's, and what loader, loss and optimizer are of a step
#   bench/run_gpu.sh peers         training beside lightly and solo-learn's manner: ResNet-18 at 32, ResNet-50 at 224
#   bench/run_gpu.sh tiles         the kernels of the losses with the tiles that are chosen and with others
#   bench/run_gpu.sh alternatives  other ways to do what msbreg does: the inverse root in one launch, pixels by a kernel
# Results are in bench/results/GPU/DATE/, or in GPU/DATE/ of the folder RESULTS, and a short table comes last. The first
# part and the tiles need torch with CUDA, Triton and the extras [test] and [bench], of which pytest-xdist may be missing:
# tests then run one by one; the others [train] too, and `peers` lightly where it is to be among them. K = 32 and the peers
# at 224 are for GPUs with 140 GB. LIMIT=300 ends a part after 300 seconds.
# Limits are seconds. Comments are the seconds that a machine with one H200 and 16 cores is expected to take, by count: the
# first part has run there, in 240 seconds with --bench-minutes 1.9, and the first dry run. What runs over is interrupted
# as by Ctrl-C, since pytest writes what it has by then, and nothing when it is terminated; what would begin when the
# part's time is over is left out.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
part=${1:-losses}
shift $(($# > 0))
case $part in losses | training | loader | peers | tiles | alternatives) ;; *)
    echo "usage: bench/run_gpu.sh [losses [OPTION...] | training | loader | peers | tiles | alternatives]" >&2
    exit 2
    ;;
esac
gpu=$("$python" -c '
import re, sys
try:
    import torch
except ImportError:
    sys.exit(f"bench/run_gpu.sh runs {sys.executable}, which has no torch; PYTHON=... names one that has.")
if torch.cuda.is_available():
    print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
') || exit
if [ -z "$gpu" ]; then
    echo "bench/run_gpu.sh measures an NVIDIA GPU, and torch finds none here; msbreg doctor says what it finds." >&2
    exit 2
fi
out=${RESULTS:-bench/results}/$gpu/$(date +%F)
limit=${LIMIT:-510}
mkdir -p "$out"
status=0

# Runs a command for so many seconds at the most, and writes what it prints to a file too. What has 15 seconds to end
# ends before the nine minutes do.
within() {
    local seconds=$1 text=$2 left=$((limit - SECONDS))
    shift 2
    if [ "$left" -le 0 ]; then
        echo "left out, since the time is over: $*" | tee -a "$text"
        status=124
        return
    fi
    timeout -s INT -k 15 "$((seconds < left ? seconds : left))" "$python" "$@" 2>&1 | tee -a "$text" || status=$?
}

keep() {
    local seconds=$1
    shift
    within "$seconds" "$out/$part.txt" "$@"
}

losses() {
    # Triton's first compilations are part of both; neither may eat the time of the other.
    rm -f "$out/tests.txt" "$out/losses.json"
    # The tests that compare clocks have the GPU to themselves; the others are compiled, and run, many at a time.
    local clocks=(tests/test_bench.py tests/test_bench_peers.py tests/test_dry_run.py)
    local parallel=()
    "$python" -c 'import xdist' >/dev/null 2>&1 && parallel=(-n auto --maxprocesses 14)
    within 180 "$out/tests.txt" -m pytest tests -m gpu "${parallel[@]}" "${clocks[@]/#/--ignore=}"
    within 80 "$out/tests.txt" -m pytest "${clocks[@]}" -m gpu
    keep 390 -m pytest bench --bench-device cuda --bench-shapes targets --bench-minutes 5.5 \
        --benchmark-json "$out/losses.json" "$@"
    "$python" bench/report.py "$out/losses.json" --out "$out" >/dev/null || status=$?

    echo
    grep -hE '^=+ .*(passed|failed|error|no tests ran).* =+$' "$out/tests.txt" "$out/losses.txt"
    "$python" bench/report.py "$out/losses.json" --short || status=$?
}

dry_run() {
    local seconds=$1 name=$2
    shift 2
    rm -f "$out/$name.json"
    keep "$seconds" -m msbreg pretrain --dry-run --json "$out/$name.json" --config "$@" --data.batch_size 256
}

# Images of 0.2 megapixels, ImageNet's mean, for views of 224: prints where they are, kept for the next time.
photos() {
    local left=$((limit - SECONDS))
    [ "$left" -gt 0 ] || return 124
    PYTHONPATH=bench${PYTHONPATH:+:$PYTHONPATH} timeout "$((left < 100 ? left : 100))" "$python" -c '
import peers; print(peers.rendered(peers.CASES["imagenet"]))'
}

training() {
    dry_run 60 resnet50-eager imagenet-resnet50-100ep --model.compile false                          # 25
    dry_run 150 resnet50 imagenet-resnet50-100ep                                                     # 90
    dry_run 90 resnet50-k32 imagenet-resnet50-100ep --data.views 32 --model.view_chunk 4 \
        --model.compile false                                                                        # 50
    dry_run 90 resnet50-300ep imagenet-resnet50-300ep                            # 50: Inductor kept what it compiled
    dry_run 100 imagenet100 imagenet100-resnet18                                                     # 65
    dry_run 60 cifar10 cifar10-resnet18                                                              # 25
}

# What needs no photographs comes first, since rendering them may fail.
loader() {
    local images
    keep 80 bench/loader.py --rounds 2 --json "$out/loader-32.json"              # 55
    keep 50 -m msbreg bench --config cifar10-resnet18 --json "$out/bench-cifar10.json"               # 25
    keep 50 -m msbreg bench --config cifar10-resnet18 --json "$out/bench-cifar10-graph.json" \
        --model.cuda_graph true                                                  # 25
    images=$(photos) || return                                                   # 40
    # On a GPU the package's other loader, Python threads, is for small machines without DALI.
    keep 240 bench/loader.py --data "$images" --size 224 --batch 64 --rounds 2 --json "$out/loader-224.json" \
        --loaders msbreg torchvision torchvision-pillow-blur                     # 170
    keep 140 -m msbreg bench --config imagenet-resnet50-100ep --data.path "$images" --data.batch_size 256 \
        --steps 10 --json "$out/bench-imagenet.json"                             # 95: LARS, K = 4, compiled
}

peers() {
    keep 170 bench/peers.py --seconds 3 --rounds 2 --json "$out/peers-small.json"                        # 150
    photos >/dev/null || return                                                  # 40
    keep 320 bench/peers.py --case imagenet --seconds 4 --rounds 2 --json "$out/peers-imagenet.json"     # 260
}

tiles() {
    keep 510 bench/tiles.py --json "$out/tiles.json"                             # 400, most of it compiling
}

alternatives() {
    local images
    keep 120 bench/operators.py --size 32 --json "$out/operators-32.json"                                # 80
    keep 60 bench/pixels.py --json "$out/pixels.json"                                                    # 30
    if images=$(photos); then                                                    # 40
        keep 120 bench/operators.py --data "$images" --json "$out/operators-224.json"                    # 90
    else
        status=1
    fi
    # Last, since programs that waited for each other in vain would hang until the limit.
    keep 100 bench/one_launch.py --json "$out/one_launch.json"                                           # 60
}

# Where the figures are from: the JSON of msbreg's own commands knows neither.
{
    git describe --always --abbrev=40 --dirty=+
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,temperature.gpu --format=csv
} >"$out/$part.txt" 2>/dev/null
"$part" "$@" || status=$?
if [ "$part" != losses ]; then
    echo
    grep '^|' "$out/$part.txt"
fi
exit "$status"
