#!/usr/bin/env bash
# Everything that waits for a GPU, in one call: build, GPU tests, benchmarks, tile timings. Results go to $OUT (default
# out/gpu). A part that fails does not stop the others; the exit status is 1 if any failed. Without a GPU it is a dry run:
# GPU tests are skipped and the benchmarks run the CPU backends at small sizes.
#
#   scripts/gpu_pass.sh              all parts
#   scripts/gpu_pass.sh test bench   some of: build inspect test bench tune
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/out/gpu} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
mkdir -p "$OUT"
log=$OUT/gpu_pass.log
: >"$log"
summary=()
failed=0

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "== $name: $*" | tee -a "$log"
  timeout "$limit" "$@" >"$OUT/.part" 2>&1 || status=$?
  cat "$OUT/.part" >>"$log"
  tail -n "${TAIL:-25}" "$OUT/.part"
  rm -f "$OUT/.part"
  if [ "$status" -eq 5 ] && [ "$device" = none ]; then
    status="0 (no GPU, no GPU tests)" # pytest: nothing was collected
  elif [ "$status" -ne 0 ]; then
    failed=1
  fi
  summary+=("$(printf '%-10s exit %-26s %4d s' "$name" "$status" $((SECONDS - start)))")
}

wanted() { [ "${#parts[@]}" -eq 0 ] || [[ " ${parts[*]} " == *" $1 "* ]]; }

parts=("$@")
for name in "${parts[@]}"; do
  case $name in build | inspect | test | bench | tune) ;; *)
    echo "gpu_pass: unknown part '$name', expected some of: build inspect test bench tune" >&2
    exit 2
    ;;
  esac
done

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")')
echo "gpu: $device, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)" | tee -a "$log"

if wanted build && [ -f setup.py ]; then
  TAIL=5 part build 240 "$python" setup.py build_ext --inplace
fi
if wanted inspect && [ "$device" != none ]; then
  arch=$("$python" -c 'import torch; from flr_kernels.triton_config import arch_of; print(arch_of(torch.cuda.get_device_capability())[0])')
  TAIL=3 part inspect 240 "$python" -m flr_kernels.inspect --arch "$arch"
fi
if wanted test; then
  part test 400 "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors tests \
    --junitxml "$OUT/tests.xml"
fi
if wanted bench; then
  TAIL=80 part bench 400 "$python" -m pytest -q -p no:cacheprovider bench --benchmark-only \
    --benchmark-columns=median --results "$OUT/results"
fi
if wanted tune; then
  part tune 200 "$python" scripts/tune_tiles.py --json "$OUT/tiles_forward.json"
  part tune-bwd 200 "$python" scripts/tune_tiles.py --backward --json "$OUT/tiles_backward.json"
fi

echo "== summary ($device)" | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
exit "$failed"
