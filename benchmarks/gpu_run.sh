#!/usr/bin/env bash
# Everything a GPU is needed for, in one call: build, test, measure. Writes result files into $OUT (default: out/).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
mkdir -p "$out"

python3 -m pip install --quiet --no-build-isolation --no-deps -e . 2>&1 | tail -n 3 || true
python3 -m llmkern info | tee "$out/info.txt"
nvidia-smi | tee -a "$out/info.txt"

set -o pipefail
python3 -m pytest -m gpu tests 2>&1 | tee "$out/tests.txt" || echo "GPU tests failed" | tee -a "$out/tests.txt"

python3 -m llmkern bench --device cuda --dtype fp32,bf16,fp16 --against torch,torch.compile \
  --json "$out/gpu.json" --html "$out/gpu.html" 2>&1 | tee "$out/bench.txt"
