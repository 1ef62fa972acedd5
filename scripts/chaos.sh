#!/bin/sh
# What survives kills, full disks, damage and load: every part of tests/chaos that is a module to run, in turn.
#
#     scripts/chaos.sh                  # all parts, their full length
#     scripts/chaos.sh training ops     # these
#
# Figures go to docs/results/chaos_*.json; `python -m scripts.reliability` makes the tables of docs/reliability.md of them.
# Exit status 1 where a part found a fault. docs/reliability.md has what each promises.
set -u
cd "$(dirname "$0")/.." || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
status=0
for part in ${*:-training data folders server ops}; do
    if [ ! -f "tests/chaos/$part.py" ]; then
        echo "chaos: $part: expected tests/chaos/$part.py, got none" >&2
        [ $# -gt 0 ] && status=1
        continue
    fi
    echo "== $part"
    python -m "tests.chaos.$part" --json "docs/results/chaos_$part.json" || status=1
done
exit $status
