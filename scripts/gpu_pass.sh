#!/usr/bin/env bash
# Everything that waits for a GPU, in one call of less than 9 minutes: build, GPU tests, compute-sanitizer on the CUDA
# extension, benchmarks, counters of the main kernels. Results go to $OUT (default out/gpu). Every part has a limit of
# its own and one that fails or runs out of time does not stop the others; the exit status is 1 if any did, and a short
# table comes last. Without a GPU it is a dry run: parts that need one are skipped, benchmarks run at their quick sizes.
#
#   scripts/gpu_pass.sh              build test memcheck racecheck bench counters
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
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
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

all=(build test memcheck racecheck bench counters inspect tune)
parts=("$@")
[ $# -gt 0 ] || parts=(build test memcheck racecheck bench counters)
for name in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] && continue
  echo "gpu_pass: unknown part '$name', expected some of: ${all[*]}" >&2
  exit 2
done
wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")')
echo "gpu: $device, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)" | tee -a "$log"

# limits of the parts of a plain call: 60 + 110 + 50 + 50 + 200 + 40 = 510 s
if wanted build; then
  TAIL=5 part build 60 "$python" setup.py build_ext --inplace
fi
if wanted test; then
  part test 110 "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors tests \
    --junitxml "$OUT/tests.xml"
fi
for tool in memcheck racecheck; do
  wanted "$tool" || continue
  extension_tests=(tests/test_csrc*.py)
  if [ "$device" = none ]; then
    skip "$tool" "no GPU"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip "$tool" "no compute-sanitizer"
  elif [ ! -e "${extension_tests[0]}" ]; then
    skip "$tool" "no tests of the CUDA extension"
  else
    # the kernels of csrc/ alone: a racecheck of everything takes longer than all of this
    TAIL=8 part "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=advantage \
      "$python" -m pytest -q -m gpu -p no:cacheprovider "${extension_tests[@]}"
  fi
done
if wanted bench; then
  tier=() # the default one
  [ "$device" != none ] || tier=(--quick)
  TAIL=90 part bench 200 "$python" -m pytest -q -p no:cacheprovider bench --benchmark-only "${tier[@]}" --budget 170 \
    --benchmark-columns=median --results "$OUT/results"
fi
if wanted counters; then
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
from flr_kernels.triton_config import arch_of
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
