"""The table of what Triton's kernels take, in docs/kernels.md: registers, shared memory, programs, and who has a stack.

    python -m flr_kernels.inspect --max_stack 8 --json > inspected.json     # under each version of Triton; no GPU
    python -m scripts.kernel_resources --add inspected.json                 # into docs/results/kernel_resources.json
    python -m scripts.kernel_resources                                      # docs/kernels.md alone

The table is of the newest version of Triton among the results; of the others a sentence says what they have in all.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/kernel_resources.json", ROOT / "docs/kernels.md"
FIELDS = ("kernel", "label", "arch", "registers", "stack", "shared", "warps", "programs")
#: Kernels of the extension, which are nvcc's.
NOT_TRITONS = ("cuda", "advantage")


def kept(report: dict[str, Any]) -> list[list[Any]]:
    """The rows of Triton's kernels in a report of the inspection, as lists of ``FIELDS``."""
    rows = [row for row in report["variants"] if not row["kernel"].endswith(NOT_TRITONS)]
    return [[row[field] for field in FIELDS] for row in rows]


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def in_all(version: str, rows: list[dict[str, Any]]) -> str:
    """One sentence about a version's variants: how many, the largest, and those with a stack."""
    spilled = [f"{r['kernel']} ({r['label']}, sm_{r['arch']}: {r['stack']} bytes)" for r in rows if r["stack"]]
    most = max(row["registers"] for row in rows), max(row["shared"] for row in rows) >> 10
    stack = f"a stack is in {len(spilled)} of them, {' and '.join(spilled)}" if spilled else "none has a stack"
    return f"Triton {version} compiles {len(rows)}, with at most {most[0]} registers and {most[1]} KB; {stack}."


def _about(version: str, trie: list[dict[str, Any]]) -> str:
    """What the cells say, and what is not among them."""
    registers, shared, programs = ([row[field] for row in trie] for field in ("registers", "shared", "programs"))
    return (
        f"The cells are for Triton {version}: registers a thread · KB of shared memory a program · programs a"
        " multiprocessor can hold. A cell is\nempty where dispatch does not choose the tile there. Not shown are"
        " float16, which differs from bfloat16 by the scaling only, and\n"
        f"{len(trie)} variants of the trie's kernels ({min(registers)} to {max(registers)} registers, at most"
        f" {max(shared) / 1024:.1f} KB, {min(programs)} programs or more)."
    )


def table(found: dict[str, list[list[Any]]]) -> str:
    """In Markdown: a line a variant of the newest version, but float16 and the trie's, and all versions in words."""
    versions = {
        version: [dict(zip(FIELDS, row, strict=True)) for row in found[version]]
        for version in sorted(found, key=_number, reverse=True)
    }
    newest, rows = next(iter(versions.items()))
    trie = [row for row in rows if row["kernel"].startswith("trie")]
    arches = sorted({row["arch"] for row in rows})
    shown: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if row not in trie and not row["label"].startswith("float16"):
            cell = f"{row['registers']} · {row['shared'] >> 10} · {row['programs']}"
            shown.setdefault((row["kernel"], row["label"]), {})[row["arch"]] = cell
    head = ["kernel", "variant", *(f"sm_{arch}" for arch in arches)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join([*key, *(cells.get(arch, '') for arch in arches)])} |" for key, cells in shown.items()]
    return "\n".join([_about(newest, trie), "", *lines, "", *(in_all(v, own) for v, own in versions.items())])


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "kernel:resources", table(json.loads(RESULT.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="*", default=[], metavar="FILE", help="reports of the inspection")
    args = parser.parse_args()
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for path in args.add:
        report = json.loads(path.read_text())
        found[report["triton"]] = kept(report)
    if args.add:
        blocks = (f'"{version}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for version, rows in found.items())
        RESULT.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
