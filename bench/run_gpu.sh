#!/usr/bin/env bash
# Everything that a GPU machine has to say about the kernels, in under nine minutes: the tests that need a GPU, the loss
# benchmarks at the shapes that have targets, and a short table last. Results are in bench/results/GPU/DATE/.
# Needs torch with CUDA, Triton, and the extras [test] and [bench].
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
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

# Triton's first compilations are part of both; neither may eat the time of the other.
timeout 230 "$python" -m pytest tests -m gpu 2>&1 | tee "$out/tests.txt" || status=$?
timeout 290 "$python" -m pytest bench --bench-device cuda --bench-shapes targets --bench-minutes 4 \
    --benchmark-json "$out/losses.json" 2>&1 | tee "$out/losses.txt" || status=$?
"$python" bench/report.py "$out/losses.json" --out "$out" >/dev/null || status=$?

echo
grep -hE '^=+ .*(passed|failed|error|no tests ran).* =+$' "$out/tests.txt" "$out/losses.txt"
"$python" bench/report.py "$out/losses.json" --short || status=$?
exit "$status"
