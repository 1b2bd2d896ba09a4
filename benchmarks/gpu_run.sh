#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: build, check, measure; results as files.
#
#   benchmarks/gpu_run.sh FOLDER [check|measure|all]
#
# FOLDER gets environment.txt, tests.log, sanitizer.log and <date>-<gpu>.json, the suite's result file, which is to be
# kept under benchmarks/results/. A step that fails does not stop the next one; summary.txt says which did.
# PYTHON: an interpreter with a CUDA build of torch, Triton and pytest (default python3). Peers (Liger, CCE, quack,
# FlashRNN) are measured as far as that interpreter has them. SECONDS_PER_STEP (default 270) ends a step.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
what=${2:-all}
python=${PYTHON:-python3}
limit=${SECONDS_PER_STEP:-270}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

step() { # NAME COMMAND...
  local name=$1 begin=$SECONDS
  shift
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $? after $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
{
  nvidia-smi
  $python -m llmkern info
  $python -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
} >"$out/environment.txt" 2>&1

# Without a compiler the kernels of the CPU are missing, which no step here needs.
$python -m pip --version >/dev/null 2>&1 && [ ! -e llmkern/_C_cpu.so ] &&
  LLMKERN_BUILD=auto step build $python -m pip install --no-build-isolation --no-deps -e .

if [ "$what" != measure ]; then
  step tests $python -m pytest -q -m gpu --durations=10 tests
  command -v compute-sanitizer >/dev/null &&
    step sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 $python -m pytest -q tests/test_gpu.py \
      -k "values or repeatable or bad_index"
fi

if [ "$what" != check ]; then
  gpu=$($python -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")
  result=$out/$(date -u +%Y-%m-%d)-$gpu.json
  suite() { # NAME CASES
    step "$1" $python -m llmkern bench --device cuda --rounds 3 --no-cold --case "$2" --dtype "${3:-bf16,fp32}" \
      --against 'llmkern+triton,torch,torch.compile,liger-kernel,cut-cross-entropy,quack,flashrnn' \
      --json "${result%.json}-$1.json"
  }
  suite losses 'cross_entropy/8192x32000,cross_entropy/4096x128256,cross_entropy/4096x32000/*,mse_loss/*'
  suite linear 'linear_cross_entropy/8192x4096x128256,linear_cross_entropy/4096x4096x128256' bf16
  suite embedding 'embedding/128256x4096x16384*,embedding/128256x2048x8192*,embedding_bag/*,fused_embedding/*'
  suite optim 'optim/*,embedding/1000000x128x8192/adam'
  suite rnn 'lstm/*,gru/*,rnn/*'
fi
cat "$out/summary.txt"
! grep -qv 'exit 0' "$out/summary.txt"
