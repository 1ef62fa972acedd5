"""Put the figures of docs/results/chaos_*.json into docs/reliability.md.

    python -m scripts.reliability           # write the page
    python -m scripts.reliability --check   # exit 1 where it is stale

``chaos_<part>.json`` has an object of figures for each thing that was tried, and ``facts`` about the run. Its table
goes between ``<!-- chaos:<part> -->`` and ``<!-- /chaos -->``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flr.files import read_json

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = "docs/reliability.md", "docs/results"
PARTS = ("training", "data", "folders", "server", "ops")


def table(result: dict[str, Any]) -> str:
    """The figures of one part, a column for each thing that was tried, and what they are of.

    Example:
        >>> print(table({"sft": {"kills": 20}, "rl": {"kills": 19, "bits": 3}}))
        |  | sft | rl |
        | --- | --- | --- |
        | kills | 20 | 19 |
        | bits | 0 | 3 |
    """
    facts = result.get("facts")
    tried = {name: values for name, values in result.items() if name != "facts"}
    figures = dict.fromkeys(figure for values in tried.values() for figure in values)
    lines = [f"|  | {' | '.join(tried)} |", f"| --- {'| --- ' * len(tried)}|"]
    lines += [f"| {f} | {' | '.join(str(values.get(f, 0)) for values in tried.values())} |" for f in figures]
    if facts:
        changed = " with changes" if facts["dirty"] else ""
        lines += [
            "",
            f"`{facts['command']}`: commit {facts['commit']}{changed}, {facts['date'][:10]}, {facts['device']}.",
        ]
    return "\n".join(lines)


def page(root: Path = ROOT) -> str:
    """What the page should hold."""
    text = (root / PAGE).read_text(encoding="utf-8")
    for part in PARTS:
        text = filled(text, f"chaos:{part}", table(read_json(root / RESULTS / f"chaos_{part}.json")))
    return text


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    options = parser.parse_args(argv)
    text = page(root)
    if (root / PAGE).read_text(encoding="utf-8") == text:
        return 0
    if options.check:
        print(f"{PAGE}: expected what {RESULTS} gives; run python -m scripts.reliability", file=sys.stderr)
        return 1
    (root / PAGE).write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
