"""Where rows are kept: ``bench/results/<device>/<commit>.json``, appended to, never rewritten.

A file holds the runs of one commit on one device; a run is the facts of its session and its rows. Reports take, for every device and
suite, the newest commit that measured it, and of a case measured twice the later run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .harness import ROOT, slug

RESULTS = ROOT / "bench/results"
Row = dict[str, Any]


def file_of(facts: dict[str, Any], folder: Path) -> Path:
    name = facts["commit"] + ("-dirty" if facts["dirty"] else "")
    return folder / slug(facts["device"]) / f"{name}.json"


def append(facts: dict[str, Any], rows: list[Row], folder: Path) -> Path:
    """Add a run to the file of its commit and device; the file is replaced in one step."""
    path = file_of(facts, folder)
    runs = load(path)["runs"] if path.exists() else []
    document = {"device": facts["device"], "commit": facts["commit"], "runs": [*runs, {**facts, "rows": rows}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
    return path


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is not one.
    """
    try:
        document = json.loads(path.read_text())
        if all("rows" in run for run in document["runs"]) and document["device"]:
            return document
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: expected a results file with device, commit and runs, got something else")


def newest(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """By device, the rows that a report shows; each also has its run's facts under ``run``. Quick runs are left out."""
    devices: dict[str, dict[str, dict[tuple[str, str], Row]]] = {}
    runs = [run for path in sorted(folder.glob("*/*.json")) for run in load(path)["runs"] if run["tier"] != "quick"]
    for run in sorted(runs, key=lambda run: run["date"]):
        facts = {key: value for key, value in run.items() if key != "rows"}
        for row in run["rows"]:
            suite = devices.setdefault(run["device"], {}).setdefault(row["suite"], {})
            if suite and next(iter(suite.values()))["run"]["commit"] != run["commit"]:
                suite.clear()
            suite[row["case"], row["variant"]] = {**row, "run": facts}
    return {device: [row for suite in suites.values() for row in suite.values()] for device, suites in devices.items()}


def ratios(document: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, float]]:
    """(suite, case, competitor) -> competitor / ours pooled over a file's runs.

    p50 is the median of the runs' medians, p20 the least p20, p80 the greatest p80; ``spread`` is the greatest of the runs' medians
    over the least, ``ours_ms`` the median of our medians.
    """
    found: dict[tuple[str, str, str], list[tuple[Row, float]]] = {}
    for run in document["runs"]:
        ours = {(r["suite"], r["case"]): r["p50_ms"] for r in run["rows"] if "p50_ms" in r and "ratio" not in r}
        for row in run["rows"]:
            if "ratio" in row:
                key = (row["suite"], row["case"], row["variant"])
                found.setdefault(key, []).append((row["ratio"], ours[key[:2]]))
    return {
        key: {
            "p20": min(ratio["p20"] for ratio, _ in given),
            "p50": float(np.median([ratio["p50"] for ratio, _ in given])),
            "p80": max(ratio["p80"] for ratio, _ in given),
            "spread": max(ratio["p50"] for ratio, _ in given) / min(ratio["p50"] for ratio, _ in given),
            "ours_ms": float(np.median([ms for _, ms in given])),
            "runs": len(given),
        }
        for key, given in found.items()
    }


def compare(a: dict[str, Any], b: dict[str, Any], threshold: float) -> tuple[list[dict[str, Any]], list[str]]:
    """What became of each ratio from ``a`` to ``b``, worst first, and notes on what only one of them has.

    A regression is a ratio that fell by more than the factor ``threshold`` and whose p80 in ``b`` is below its p20 in ``a``.

    Raises:
        ValueError: a threshold of 1 or less, or no ratio in common.
    """
    if not threshold > 1:
        raise ValueError(f"threshold: expected a factor above 1, got {threshold}")
    before, after = ratios(a), ratios(b)
    common = before.keys() & after.keys()
    if not common:
        raise ValueError(f"expected two files with a ratio in common, got {len(before)} and {len(after)} with none")
    changes = []
    for key in common:
        old, new = before[key], after[key]
        change = new["p50"] / old["p50"]
        regression = change < 1 / threshold and new["p80"] < old["p20"]
        changes.append({"key": key, "a": old, "b": new, "change": change, "regression": regression})
    notes = [f"only in {name}: {' · '.join(key)}" for name, key in _only(before, after)]
    return sorted(changes, key=lambda change: change["change"]), notes


def _only(before: Iterable, after: Iterable) -> Iterator[tuple[str, tuple[str, str, str]]]:
    for name, ours, theirs in (("the first", before, after), ("the second", after, before)):
        yield from ((name, key) for key in sorted(set(ours) - set(theirs)))
