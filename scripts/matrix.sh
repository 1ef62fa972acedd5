#!/usr/bin/env bash
# The tests in an environment of one kind, installed by uv from the package index.
#   scripts/matrix.sh lowest|newest|3.10|3.13 [FOLDER] [-- PYTEST ARGUMENTS]
#     lowest  Python 3.10 with the lowest versions that pyproject.toml admits
#     newest  Python 3.12 with the newest versions, without constraints.txt
#     3.10, 3.13  that Python with constraints.txt
# FOLDER (default: a temporary one, removed at the end) gets a copy of the tracked files and the environment: 3 to 8 GB with
# a CUDA build of torch. Tests that need a GPU or a browser are skipped where there is none. uv finds Pythons on PATH, or
# fetches them. The outcome is one line at the end (versions, counts, minutes), and FOLDER/outcome.json for
# scripts/matrix_table.py.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  lowest) python=3.10 options=(--resolution lowest-direct) ;;
  newest) python=3.12 options=(--resolution highest) ;;
  3.10 | 3.13) python=$1 options=(-c constraints.txt) ;;
  *) echo "scripts/matrix.sh: expected lowest, newest, 3.10 or 3.13, got '${1:-}'" >&2; exit 2 ;;
esac
kind=$1
shift
folder=
if [[ $# -gt 0 && $1 != -- ]]; then
  folder=$1
  shift
fi
if [[ $# -gt 0 ]]; then
  [[ $1 == -- ]] || { echo "scripts/matrix.sh: expected -- before pytest's arguments, got '$1'" >&2; exit 2; }
  shift
fi
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" # as pip: an index behind a proxy has one that uv's own list lacks
unset PYTHONPATH VIRTUAL_ENV
mkdir -p "$folder/source"
commit=$(git describe --always --dirty --exclude '*')
git ls-files -z | tar --null -T - -c | tar -x -C "$folder/source"
cd "$folder/source"
[[ -x ../venv/bin/python ]] || uv venv -q --python "$python" ../venv
. ../venv/bin/activate
uv pip install -q "${options[@]}" -e ".[test,bench]"
SECONDS=0
status=0
python -m pytest -q -n "${MATRIX_WORKERS:-2}" "$@" 2>&1 | tee "$folder/pytest.txt" || status=$?
python - "$kind" "$SECONDS" "$commit" "$(tail -n 1 "$folder/pytest.txt")" "$folder/outcome.json" <<'PYTHON'
import datetime, json, platform, re, sys
from importlib.metadata import version
kind, seconds, commit, last, file = sys.argv[1:]
names = ("torch", "triton", "transformers", "accelerate", "peft", "numpy", "tokenizers")
versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
tests = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
minutes = round(int(seconds) / 60)
run = {"kind": kind, "commit": commit, "date": f"{datetime.date.today()}", "versions": versions, "tests": tests, "minutes": minutes}
with open(file, "w") as out:
    json.dump(run, out)
print(f"{kind}: {', '.join(map(' '.join, versions.items()))}: {last.strip('= ')}; {minutes} minutes")
PYTHON
exit "$status"
