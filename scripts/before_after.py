"""Ten points where users waited, at a commit before them and now: numbers, and the table of docs/benchmarks.md.

    git worktree add --detach ../before 6c749f6
    (cd ../before && python setup.py build_ext --inplace)      # the C++ half is enough
    python -m scripts.before_after --before ../before          # 15 CPU minutes; --points 1 4 for some of them
    python -m scripts.before_after --table                     # the table alone, from the results
    python -m scripts.before_after --check                     # exit 1 where the page is stale

For every point two processes work on the same inputs, one that imports the package of the worktree before and one that
imports this one's (scripts/before_after_races.py); both run the competitors of this one. Where they must compute the
same, they are compared first. Then they take turns, and the one that goes first changes from round to round. Seconds
are CPU seconds of one thread, which other programs disturb less than seconds on the wall: the ratios say more than the
seconds do. Shown are medians of the rounds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.machine import device_name, facts
from flr.files import read_json, write_json

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = "docs/results/before_after.json", "docs/benchmarks.md"
SIDES = ("before", "after")
#: Two results are alike where numbers differ by less than this part of the largest.
ALIKE = 1e-4
CODE = ("flr", "flr_kernels", "csrc", "setup.py")


class Row(NamedTuple):
    """A line of the table: one of the numbers of a point's rounds."""

    key: str
    text: str
    unit: str = ""  # "ms", "s", "MiB": the number, in seconds or bytes, is shown so
    more_is_better: bool = False
    target: float | None = None  # of the number afterwards; of its gain with ``of_gain``
    of_gain: bool = False


class Point(NamedTuple):
    work: str
    sizes: str
    rows: tuple[Row, ...]
    rounds: int = 100  # at most


def races(*names: str, text: str = "eager / ours") -> tuple[Row, ...]:
    return tuple(Row(name, f"{name}, {text}", more_is_better=True) for name in names)


POINTS = {
    "1": Point(
        "shares",
        "SmolLM2's layers, 4 of 30, V = 6,554, K = 4, 1,000 titles, histories of 3, k = 10, 20 beams",
        (
            Row("catalogue", "shares, as a part of the search's time, `catalogue`", target=0.5),
            Row("full", "the same, `full`", target=0.5),
            Row("catalogue search", "a search for one user, `catalogue`", "ms"),
            Row("full search", "the same, `full`", "ms"),
        ),
    ),
    "2": Point(
        "one_token",
        "64 users × 10⁵ items",
        (
            Row("time", "one-token evaluation: ranks and lists", "ms"),
            Row("memory", "memory on top of the scores, bytes a cell", target=8),
        ),
    ),
    "3": Point(
        "loading",
        "titles of five words, processor and trie",
        (Row("load", "loading 10⁵ titles", "s"), Row("save", "saving it (once)", "s")),
    ),
    "3 million": Point("loading_million", "the same", (Row("load", "loading 10⁶ titles", "s", target=2.0),), rounds=2),
    "4": Point(
        "forced_runs",
        "the model and the titles of 1",
        (Row("full", "forwards a user, `full`"), Row("catalogue", "forwards a user, `catalogue`")),
    ),
    "5": Point(
        "heads",
        "12 heads, 2 of keys, 64 wide",
        (
            Row("one", "attention of 20 beams to 210 columns", "ms", target=3.0, of_gain=True),
            Row("eight", "the same for 8 users", "ms", target=3.0, of_gain=True),
            Row("step", "RL step of 2 layers with an MLP of 64: 8 × 16 tokens behind 256", "ms"),
        ),
    ),
    "6": Point(
        "item_knn",
        "4·10⁵ rows, 10⁵ items",
        (Row("time", "item-kNN, fit", "s"), Row("memory", "item-kNN, peak memory", "MiB")),
    ),
    "7": Point(
        "logprob",
        "512 rows, D = 512, V = 10,432",
        tuple(row._replace(text=f"`token_logprob` with backward, {row.text}") for row in races("trained", "frozen")),
    ),
    "8": Point(
        "groups",
        "users × members × tokens; 64 × 4 × 1,536",
        (
            *races("advantages 4 × 8 × 16", "advantages 64 × 8 × 16", "advantages 64 × 64 × 256"),
            Row("aggregate", "aggregation with backward, eager / ours", more_is_better=True),
        ),
    ),
    "9": Point(
        "reinforcement",
        "D = 512, 8 layers, V = 10,432, prompts of 256, 16 tokens × 8 members",
        (
            Row("1 ratio", "RL step of 1 prompt, `grouped` / ours", more_is_better=True, target=2.5),
            Row("4 ratio", "RL step of 4 prompts, `grouped` / ours", more_is_better=True, target=2.5),
            Row("1 ours", "ours, 1 prompt", "ms"),
            Row("4 ours", "ours, 4 prompts", "ms"),
        ),
    ),
    "9 SFT": Point(
        "supervised",
        "the same model, 8 rows",
        (
            Row("ratio", "SFT step, `plain` / ours", more_is_better=True, target=1.3),
            Row("ours", "ours", "s"),
        ),
    ),
    "10": Point(
        "server",
        "D = 64, 2 layers, 300 titles, 8 clients, 64 requests",
        (
            Row("one", "server, requests a CPU second, one by one", more_is_better=True),
            Row("batches", "server, requests a CPU second, in batches", more_is_better=True),
        ),
    ),
}


class Worker:
    """A process that works on one point with the package of ``tree``."""

    def __init__(self, tree: Path, work: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("before_after_races.py")), work]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.tree = tree

    def begun(self) -> dict[str, list[float]]:
        """What it computed."""
        said = self._said()
        if not Path(said["flr"]).is_relative_to(self.tree):
            raise ValueError(f"before: expected flr of {self.tree}, got {said['flr']}")
        return said["found"]

    def round(self) -> dict[str, float]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._said()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def _said(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"expected a line of {self.process.args}, got its end")
        return json.loads(line)


def apart(found: dict[str, dict[str, list[float]]]) -> float:
    """By which part of the largest number the results of both differ, at most."""
    before, after = found["before"], found["after"]
    if {name: len(x) for name, x in before.items()} != {name: len(x) for name, x in after.items()}:
        raise ValueError("before: expected results of the same names and lengths")
    worst = 0.0
    for name, numbers in before.items():
        a, b = (np.nan_to_num(np.array(x, float), posinf=0, neginf=0) for x in (numbers, after[name]))
        bound = 0.0 if name.endswith("items") else ALIKE
        difference = float(abs(a - b).max() / max(abs(a).max(), 1e-30))
        if difference > bound:
            raise ValueError(f"{name}: expected the same within {bound}, got a difference of {difference}")
        worst = max(worst, difference)
    return worst


def measured(point: Point, trees: dict[str, Path], rounds: int) -> dict[str, Any]:
    """The rounds of both, and how far apart their results are."""
    workers = {side: Worker(trees[side], point.work) for side in SIDES}
    try:
        difference = apart({side: worker.begun() for side, worker in workers.items()})
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        rounds = min(rounds, point.rounds)
        for number in range(rounds):
            for side in SIDES if number % 2 else SIDES[::-1]:
                found[side].append(workers[side].round())
        for worker in workers.values():
            worker.end()
    finally:
        for worker in workers.values():
            worker.process.kill()
    numbers = {side: {key: [float(f"{x[key]:.4g}") for x in found[side]] for key in found[side][0]} for side in SIDES}
    return {"sizes": point.sizes, "rounds": rounds, "apart": float(f"{difference:.1g}"), **numbers}


def shown(value: float, unit: str) -> str:
    value *= {"ms": 1e3, "MiB": 2.0**-20}.get(unit, 1)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.0995 else f"{value:.2g}"


def cell(values: list[float], unit: str) -> str:
    """Median, least and greatest."""
    if len(set(values)) == 1:
        return f"{shown(values[0], unit)} {unit}".rstrip()
    least, greatest = shown(min(values), unit), shown(max(values), unit)
    return f"{shown(statistics.median(values), unit)} {unit}".rstrip() + f" ({least} to {greatest})"


def line(number: str, row: Row, result: dict[str, Any]) -> str:
    """A line of the table."""
    values = [result[side][row.key] for side in SIDES]
    before, after = (statistics.median(x) for x in values)
    gain = after / before if row.more_is_better else before / max(after, 1e-30)
    wanted = ""
    if row.target is not None:
        reached = gain if row.of_gain else after
        met = reached >= row.target if row.more_is_better or row.of_gain else reached <= row.target
        target = f"{row.target:g}× better" if row.of_gain else f"{row.target:g}"
        wanted = f"{target}: {'met' if met else '**missed**'}"
    cells = (f"{number}. {row.text}", *(cell(x, row.unit) for x in values), f"{gain:.2f}×", wanted)
    return f"| {' | '.join(cells)} |"


def table(report: dict[str, Any]) -> str:
    """In Markdown, with what it was measured on."""
    lines = ["| | before | after | better | target |", "|---|---|---|---|---|"]
    points = [number for number in POINTS if number in report["points"]]
    for number in points:
        lines += [line(number.split()[0], row, report["points"][number]) for row in POINTS[number].rows]
    given = {number: report["points"][number]["sizes"] for number in points}
    sizes = "; ".join(f"{number.split()[0]}: {text}" for number, text in given.items() if text != "the same")
    counts = [report["points"][number]["rounds"] for number in points]
    rounds = f"{min(counts)} to {max(counts)} rounds"
    worst = max(report["points"][number]["apart"] for number in points)
    runs: dict[str, list[str]] = {}
    for number in points:
        runs.setdefault(conditions(report["points"][number]["run"]), []).append(number.split()[0])
    lines += [
        "",
        *(f"Points {', '.join(dict.fromkeys(own))}: {text}." for text, own in runs.items()),
        f"One thread, beside other programs. CPU time; medians of {rounds}, least and greatest.",
        f"What both compute is the same within {worst:g} of the largest number, and lists of items wholly.",
        f"Sizes. {sizes}.",
    ]
    return "\n".join(lines)


def conditions(run: dict[str, Any]) -> str:
    """Commits, machine, versions and day of a point."""
    about, commits = run["machine"], run["commits"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "cuda")
    return f"commits {commits['before']} and {commits['after']}, {about['device']}, {versions}, {about['date']}"


def page(root: Path = ROOT) -> str:
    """What the page should hold."""
    return filled((root / PAGE).read_text(encoding="utf-8"), "before-after", table(read_json(root / RESULT)))


def git(tree: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, check=True).stdout.strip()


def commits_of(trees: dict[str, Path]) -> dict[str, str]:
    """The commit before, and the one since which this worktree's package has not changed."""
    for side, tree in trees.items():
        if changed := git(tree, "status", "--porcelain", "--", *CODE):
            raise ValueError(f"{side}: expected a package as committed, got changes:\n{changed}")
    after = git(trees["after"], "log", "-1", "--format=%h", "--", *CODE)
    return {"before": git(trees["before"], "rev-parse", "--short", "HEAD"), "after": after}


def measure(options: argparse.Namespace) -> None:
    """Measure points, one after the other; what is measured is in the results at once."""
    trees = {"before": options.before.resolve(), "after": ROOT}
    file = options.output
    report = read_json(file) if file.exists() else {}
    about = facts()
    machine = {"device": device_name(), "versions": about["versions"], "date": about["date"][:10]}
    run = {"machine": machine, "commits": commits_of(trees)}
    points = report.setdefault("points", {})
    for number in options.points:
        points[number] = {**measured(POINTS[number], trees, options.rounds), "run": run}
        write_json(file, report)
        print(*(line(number, row, points[number]) for row in POINTS[number].rows), sep="\n", flush=True)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="worktree of the commit before, with its extension built")
    parser.add_argument("--output", type=Path, default=root / RESULT)
    parser.add_argument("--points", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="write the page from the results alone")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    options = parser.parse_args(argv)
    if options.before is not None:
        measure(options)
    elif not options.table and not options.check:
        parser.error("expected --before, --table or --check")
    if (root / PAGE).read_text(encoding="utf-8") == page(root):
        return 0
    if options.check:
        sys.stderr.write(f"{PAGE}: expected what {RESULT} says; run python -m scripts.before_after --table\n")
        return 1
    (root / PAGE).write_text(page(root), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
