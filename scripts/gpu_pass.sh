#!/usr/bin/env bash
# Everything that waits for a GPU, in one call of less than 9 minutes: build, GPU tests, benchmarks, compute-sanitizer on the
# CUDA extension, counters of the main kernels. Results go to $OUT (default out/gpu). Every part has a limit of its own, and all
# together $TOTAL seconds (default 530, where no parts are named); one that fails or runs out of time does not stop the others; the
# exit status is 1 if any did, and a short table comes last. Without a GPU it is a dry run: parts that need one are skipped,
# benchmarks run at their quick sizes, limits are four times as long.
#
#   scripts/gpu_pass.sh              build test bench steps decode memcheck racecheck serve counters
#   scripts/gpu_pass.sh test bench   some of these, or: inspect (minutes on few cores) tune (minutes)
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/out/gpu} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
mkdir -p "$OUT"
log=$OUT/gpu_pass.log
: >"$log"
summary=()
failed=0

part() { # part NAME SECONDS COMMAND...; an interrupt first, so that pytest still writes what it has
  local name=$1 limit=$2 start=$SECONDS status=0 left=$((total - SECONDS))
  shift 2
  if ((left < 10)); then
    skip "$name" "no time left"
    failed=1
    return
  fi
  [ "$device" != none ] || limit=$((4 * limit)) # a dry run, on fewer cores
  ((limit <= left)) || limit=$left
  echo "== $name: $*" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/.part" 2>&1 || status=$?
  cat "$OUT/.part" >>"$log"
  tail -n "${TAIL:-25}" "$OUT/.part"
  rm -f "$OUT/.part"
  case $status in
    0) status=passed ;;
    5) status="passed (no tests)" ;; # pytest: nothing was collected
    124 | 137) status="out of time" failed=1 ;;
    *) status="failed, exit $status" failed=1 ;;
  esac
  summary+=("$(printf '%-10s %-22s %4d s of %3d' "$name" "$status" $((SECONDS - start)) "$limit")")
}

skip() { # skip NAME REASON
  echo "== $1: skipped, $2" | tee -a "$log"
  summary+=("$(printf '%-10s skipped: %s' "$1" "$2")")
}

usual=(build test bench steps decode memcheck racecheck serve counters)
all=("${usual[@]}" inspect tune)
parts=("$@")
total=${TOTAL:-3600}
if [ $# -eq 0 ]; then
  parts=("${usual[@]}")
  total=${TOTAL:-530}
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")') || device=none
[ "$device" != none ] || total=$((4 * total))
for name in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] && continue
  echo "gpu_pass: unknown part '$name', expected some of: ${all[*]}" >&2
  exit 2
done
wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }

# What Triton compiles, filled beforehand and carried (scripts/triton_cache.py --fill build/triton_cache): good for the same sources,
# Triton and Python; anything else is compiled here as ever.
if [ -z "${TRITON_CACHE_DIR:-}" ] && [ -d build/triton_cache ]; then
  "$python" scripts/triton_cache.py --place build/triton_cache | tee -a "$log" && export TRITON_CACHE_DIR=$PWD/build/triton_cache
fi

echo "gpu: $device, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)" | tee -a "$log"

# seconds that each took on an H200 with 16 cores, or is expected to, before its limit
if wanted build; then # 40 for all architectures; 10 for one
  arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
  FLR_CUDA_ARCH_LIST=${FLR_CUDA_ARCH_LIST:-$arch} TAIL=5 part build 90 "$python" setup.py build_ext --inplace
fi
if wanted test; then # 50 with pytest-xdist: most of it imports and Triton's compilations
  workers=()
  ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  part test 150 "$python" -m pytest -q -m gpu -p no:cacheprovider "${workers[@]}" --continue-on-collection-errors tests \
    --junitxml "$OUT/tests.xml"
fi
bench() { # bench PART LIMIT BUDGET FILE...; the first case of every test is run before the second of any
  local name=$1 limit=$2 budget=$3 tier=()
  shift 3
  [ "$device" != none ] || tier=(--quick)
  TAIL=60 part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider "${@/#/bench/test_}" --benchmark-only "${tier[@]}" \
    --budget "$budget" --benchmark-columns=median --results "$OUT/results"
}
if wanted bench; then # 100, all of the budget: torch.compile 5-15 a case, a race 2-5; 12 tests, 35 cases
  bench bench 130 100 factor_attention.py factor_aggregate.py reasoner.py group_advantage.py token_logprob.py
fi
if wanted steps; then # 40: RL, 28 layers, 32 rows of 273 tokens: published 100 TFLOP, 0.4 a call, ours 0.05; SFT 0.2 and 0.1; 8 calls each
  bench steps 100 50 train_step.py shared_prompt.py adapters.py
fi
if wanted decode; then # 60: Python dictionaries of up to 10⁶ items are built and walked on the host
  bench decode 90 50 decode.py group_ranks.py
fi
for tool in memcheck racecheck; do # 25 each: the kernels of csrc/ alone; a racecheck of everything takes longer than all of this
  wanted "$tool" || continue
  extension_tests=(tests/kernels/test_csrc.py)
  if [ "$device" = none ]; then
    skip "$tool" "no GPU"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip "$tool" "no compute-sanitizer"
  elif [ ! -e "${extension_tests[0]}" ]; then
    skip "$tool" "no tests of the CUDA extension"
  else
    TAIL=8 part "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=advantage \
      "$python" -m pytest -q -m gpu -p no:cacheprovider "${extension_tests[@]}"
  fi
done
if wanted serve; then # 60: two servers of 6 GB to start, 128 requests one by one 4 a call, latencies 16
  bench serve 100 60 server.py
fi
if wanted counters; then # 20
  if [ "$device" = none ]; then
    skip counters "no GPU"
  elif ! command -v ncu >/dev/null; then
    skip counters "no ncu"
  else
    metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,lts__t_bytes.sum,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
    TAIL=70 part counters 40 ncu --profile-from-start off --clock-control none --metrics "$metrics" \
      --kernel-name 'regex:(forward|backward|combine|delta).*kernel' "$python" scripts/profile_kernels.py
  fi
fi
if wanted inspect; then
  arch=()
  [ "$device" = none ] || arch=(--arch "$("$python" -c 'import torch
from flr_kernels.backends.triton_config import arch_of
print(arch_of(torch.cuda.get_device_capability())[0])')")
  TAIL=3 part inspect 400 "$python" -m flr_kernels.inspect "${arch[@]}"
fi
if wanted tune; then
  part tune 200 "$python" scripts/tune_tiles.py --json "$OUT/tiles_forward.json"
  part tune-back 200 "$python" scripts/tune_tiles.py --backward --json "$OUT/tiles_backward.json"
fi

echo "== summary ($device)" | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
exit "$failed"
