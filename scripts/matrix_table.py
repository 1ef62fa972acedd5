"""Outcomes of ``scripts/matrix.sh`` as a table of docs/installation.md.

python -m scripts.matrix_table FOLDER/outcome.json    # of a run, in place of the last one of its kind
python -m scripts.matrix_table                        # the page alone
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flr.files import read_json, write_json

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/matrix.json", ROOT / "docs/installation.md"
KINDS = ("newest", "lowest", "3.10", "3.13")
SHOWN = (("python",), ("torch", "triton"), ("transformers",), ("accelerate", "peft", "numpy"))
#: What is counted, and what it is in pytest's last line.
COUNTED = {"passed": ("passed",), "failed": ("failed", "error"), "skipped": ("skipped",)}


def table(outcomes: dict[str, Any]) -> str:
    """A row for each kind: when, versions, counts of tests, minutes."""
    header = ["kind", "date", *(", ".join(names) for names in SHOWN), ", ".join(COUNTED), "minutes"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for kind in KINDS:
        run = outcomes[kind]
        versions = [", ".join(run["versions"][name] for name in names) for names in SHOWN]
        counts = ", ".join(str(sum(run["tests"].get(word, 0) for word in words)) for words in COUNTED.values())
        lines.append(f"| {' | '.join([kind, run['date'], *versions, counts, str(run['minutes'])])} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "installation:matrix", table(read_json(RESULT, 1 << 20)))


def main() -> None:
    outcomes = read_json(RESULT, 1 << 20)
    for file in sys.argv[1:]:
        run = read_json(file, 1 << 20)
        outcomes[run.pop("kind")] = run
    write_json(RESULT, outcomes)
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
