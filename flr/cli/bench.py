"""``flr bench``: run the benchmark suite, render its results, compare two of them; for a checkout of the repository."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import flr
from flr.config import POSITIVE, check_numbers

from . import voice
from .parsing import add_voice, emit

ABOUT = "Run the benchmarks, render tables and figures from committed results, or compare two results files."


def _suite(name: str) -> Any:
    """A module of the suite, which is part of the checkout, not of the installed package."""
    root = Path(flr.__file__).resolve().parents[1]
    if not (root / "bench/harness.py").is_file():
        raise ValueError(f"flr bench: expected a checkout with the folder bench/, got {root}; see docs/benchmarks.md")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"bench.{name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flr bench", description=ABOUT)
    add_voice(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="pytest bench/ --benchmark-only; further words go to pytest")
    tier = run.add_mutually_exclusive_group()
    tier.add_argument("--quick", action="store_true", help="smallest sizes, minutes")
    tier.add_argument("--full", action="store_true", help="largest sizes and sweeps besides the default ones")
    report = commands.add_parser("report", help="tables into the documents, figures into docs/figures")
    report.add_argument("--results", type=Path, help="folder of results (default: bench/results)")
    baseline = commands.add_parser("baseline", help="the steady ratios of several runs, to compare later ones with")
    baseline.add_argument("output", type=Path, help="file to write")
    baseline.add_argument("results", type=Path, nargs="+", help="results files, three runs in all or more")
    without = "leave these out: variants of ours, that may become faster"
    baseline.add_argument("--without", nargs="+", default=(), metavar="VARIANT", help=without)
    added = "variants that earlier baselines have not: from the runs, of any height; all others stay as they were"
    baseline.add_argument("--added", nargs="+", default=(), metavar="VARIANT", help=added)
    compare = commands.add_parser("compare", help="ratios competitor / ours of two files; status 1 on a regression")
    before = "results file, before, or a baseline: then B must have all of it"
    compare.add_argument("a", type=Path, metavar="A", help=before)
    compare.add_argument("b", type=Path, metavar="B", help="results file, after")
    compare.add_argument("--threshold", type=float, default=1.5, help="factor a ratio may fall by (default 1.5)")
    return parser


def _print_changes(changes: list[dict[str, Any]]) -> None:
    table = voice.table("", "suite", "case", "competitor", "A: competitor / ours", "B", "B / A", "ours, ms", text=3)
    for change in changes:
        a, b = change["a"], change["b"]
        table.add_row(
            *change["key"],
            *(f"{ratio['p50']:.3g} ({ratio['p20']:.3g} to {ratio['p80']:.3g})" for ratio in (a, b)),
            f"{change['change']:.2f}" + (" REGRESSION" if change["regression"] else ""),
            f"{a['ours_ms']:.3g} to {b['ours_ms']:.3g}",
        )
    voice.result(table)


def main(argv: list[str]) -> int:
    options, rest = _parser().parse_known_args(argv)
    voice.manner.json, voice.manner.quiet = options.json, options.quiet
    if rest and options.command != "run":
        raise ValueError(f"flr bench {options.command}: expected no further arguments, got {' '.join(rest)}")
    if options.command == "run":
        root = _suite("harness").ROOT
        tier = ["--quick"] if options.quick else ["--full"] if options.full else []
        command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", *tier, *rest]
        return subprocess.run(command, cwd=root).returncode
    results = _suite("results")
    if options.command == "report":
        changed = _suite("report").report(options.results or results.RESULTS)
        lines = [f"{'Wrote' if path.exists() else 'Removed'} {path}" for path in changed]
        voice.result("\n".join(lines) or "Nothing changed.")
        emit({"changed": [str(path) for path in changed]}, options.json)
        return 0
    if options.command == "baseline":
        given = [results.load(path) for path in options.results]
        document = results.baseline(given, tuple(options.without), tuple(options.added))
        results.write(document, options.output)
        voice.result(f"Wrote {options.output}: {len(document['baseline'])} steady ratios.")
        emit({"output": str(options.output), "ratios": len(document["baseline"])}, options.json)
        return 0
    check_numbers(options, {"threshold": POSITIVE})
    a, b = results.load(options.a), results.load(options.b)
    changes, missing, new = results.compare(a, b, options.threshold)
    _print_changes(changes)
    regressions = [" · ".join(change["key"]) for change in changes if change["regression"]]
    required = "baseline" in a
    for key in missing:
        voice.result(f"{'MISSING' if required else 'only'} in {'B' if required else 'A'}: {' · '.join(key)}")
    for key in () if required else new:
        voice.result(f"only in B: {' · '.join(key)}")
    voice.result(f"{len(changes)} ratios, {len(regressions)} fell past a factor of {options.threshold:g}.")
    emit({"changes": changes, "regressions": regressions, "only_a": missing, "only_b": new}, options.json)
    return 1 if regressions or (required and missing) else 0
