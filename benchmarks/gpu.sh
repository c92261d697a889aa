#!/usr/bin/env bash
# Runs the GPU suite on one large card (80 GB or more), without a network, in under 25 minutes.
#
#   benchmarks/gpu.sh [diffs] [train] [ask] [growth]      default: all of them
#
#   PYTHON   interpreter with a CUDA jax (default python3)
#   WHEELS   folder of wheels to install first, for what the image lacks
#   OUT      results (default runs/benchmarks-gpu)
#   MODEL    shape (default qwen3-4b)
#
# Baselines are left out if PyTorch, transformers or PEFT is missing. A command that fails or takes too long
# becomes a row that says so; the others continue.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/benchmarks-gpu} MODEL=${MODEL:-qwen3-4b}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SCRATCH/site" "$WHEELS"/*.whl
  export PYTHONPATH="$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$SCRATCH/compiled}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

bench() { # suite, seconds for the command, flags
  local suite=$1 limit=$2
  shift 2
  echo "== $suite $*"
  timeout "$limit" "$PYTHON" -m benchmarks.run --suite "$suite" --platform gpu --dtype bfloat16 \
    --weights "$SCRATCH" --out "$OUT" "$@" || echo "== exit $?"
}
against() { # the baselines that can run here
  "$PYTHON" -c 'import torch, transformers, peft' 2> /dev/null && echo "$@"
}

# The compiled programs decided how to compute (`python -m benchmarks.compiled`, docs/performance.md). Unrolled
# layers take a minute or two to compile.
FAST=(--remat dots --attention cudnn)
diffs() {
  # shellcheck disable=SC2046
  bench diffs 255 --model "$MODEL" "${FAST[@]}" --repeats 2 --baseline $(against torch-batched peft-loop)
  bench diffs 120 --model "$MODEL" "${FAST[@]}" --scan-layers no --repeats 2 --baseline
  bench diffs 75 --model "$MODEL" --remat full --repeats 2 --baseline
}
train() {
  # shellcheck disable=SC2046
  bench train 255 --model "$MODEL" "${FAST[@]}" --scan-layers no \
    --baseline $(against torch-dense torch-factored peft-one-by-one)
  bench train 60 --model "$MODEL" "${FAST[@]}" --baseline
  bench train 75 --model "$MODEL" "${FAST[@]}" --batch 256 --diffs 256 --steps 4 --baseline
  bench train 90 --model qwen3-8b "${FAST[@]}" --batch 64 --steps 4 --baseline
}
ask() {
  # shellcheck disable=SC2046
  bench ask 300 --model "$MODEL" --scan-layers no --repeats 1 --baseline $(against generate-merged generate-peft)
  bench ask 60 --model "$MODEL" --baseline
  bench ask 120 --model qwen3-32b --baseline
}
growth() {
  timeout 90 "$PYTHON" -m benchmarks.growth --model qwen3-0.6b --platform gpu --dtype bfloat16 --remat full \
    --repeats 2 --sizes 4 16 64 --lengths 64 256 --out "$OUT" || echo "== exit $?"
}

for stage in "${@:-diffs}" $([ $# -eq 0 ] && echo train ask growth); do
  "$stage"
done
cat "$OUT/results.md"
