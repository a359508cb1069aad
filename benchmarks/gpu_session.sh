#!/usr/bin/env bash
# The first ten minutes on a GPU, in order of importance: bash benchmarks/gpu_session.sh
#
# There is no set-up step: Python with torch 2.11 or newer ($PYTHON, else python3) and pytest, pandas, pyarrow, scipy do. What
# else that Python lacks lies as wheels in benchmarks/wheels ($WHEELS), made on a machine with a registry:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -c constraints.txt -d benchmarks/wheels \
#     trl transformers tokenizers datasets accelerate huggingface_hub httpx2 httpcore2 truststore dill multiprocess xxhash \
#     pydantic pydantic_core annotated-types typing-inspection blake3
# Every part has its own limit of time and its own files in $OUT (else gpu_results); one that fails or runs out of time
# does not stop the next. Without a GPU the plan is printed. --slice: the smallest slice of every part, on a CPU.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu_results} WHEELS=${WHEELS:-benchmarks/wheels}
slice=${1:-}
failed=0
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() {
  echo "$*"
  [ "$mode" = plan ] || echo "$*" >>"$OUT/session.txt"
}

# part NAME SECONDS COMMAND...: prints it, or runs it and says what came of it.
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [ "$slice" = --slice ] && limit=$((4 * limit)) # a CPU that others use as well
  say "$name, at most $limit s: $*"
  [ "$mode" = plan ] && return
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  case $status in
    0) word=passed ;;
    124 | 137) word="ran out of time" ;;
    *) word="failed ($status)" ;;
  esac
  [ $status = 0 ] || failed=1
  tail -n 25 "$OUT/$name.log"
  say "$name: $word after $((SECONDS - start)) s"
}

look='
import sys, torch
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"torch {torch.__version__} is older than 2.11: set PYTHON to one that has it")
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
'
if ! gpu=$("$PYTHON" -c "$look"); then
  echo "$PYTHON cannot be used; the plan:"
  mode=plan
elif [ -z "$gpu" ] && [ "$slice" != --slice ]; then
  echo "torch finds no CUDA device; the plan:"
  mode=plan
else
  mode=run
  mkdir -p "$OUT"
  say "${gpu:-CPU}"
fi

if [ $mode = run ] && ls "$WHEELS"/*.whl >/dev/null 2>&1; then
  # Into a folder of its own, so that nothing of the machine changes.
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  timeout 30 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$site:$PYTHONPATH"
fi

collect= small= speed="--gpu-shapes 135M 1.7B --lengths 2048 --steps 6"
rates= rollouts="--shape 135M --device cuda --prompts 128 --batch 64 --mean 96 --longest 256 --rounds 1"
if [ "$slice" = --slice ]; then
  collect=--collect-only small="--shape minute --device cpu"
  speed="--device cpu --gpu-shapes minute --lengths 32 --steps 1 --stages sft"
  rates="--device cpu --seconds 5" rollouts="--shape minute --prompts 8 --batch 4 --mean 8 --longest 16 --rounds 1"
fi
# Only files with such tests: the others import what a machine like this need not have.
tests=$(grep -rl --include='test_*.py' '^@pytest.mark.gpu' tests | sort)
part 1-tests 120 "$PYTHON" -m pytest -m gpu -p no:cacheprovider -v $collect $tests
part 2-bfloat16 80 "$PYTHON" benchmarks/gpu_session.py bfloat16 "$OUT/2-bfloat16.json" $small
part 3-resume 70 "$PYTHON" benchmarks/gpu_session.py resume "$OUT/3-resume.json" $small
part 4-speed 120 "$PYTHON" benchmarks/training.py --parts 3 --results "$OUT/4-speed.json" $speed
part 5-rates 60 "$PYTHON" -m smoltulu.tasks.machine.measure "$OUT" --seconds 45 $rates
part 6-ablations 80 "$PYTHON" benchmarks/gpu_session.py ablations "$OUT/6-ablations.json" $small
part 7-rollouts 40 "$PYTHON" benchmarks/generation.py $rollouts
exit $failed
