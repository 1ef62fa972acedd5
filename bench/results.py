"""Where rows are kept: ``bench/results/<device>/<commit>.json``, appended to, never rewritten, removed once superseded.

A file holds the runs of one commit on one device; a run is the facts of its session and its rows. Reports take, for
every device and kind of work (suite, first word of a case if it is one), the newest commit that measured it, and of a
case measured twice the later run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .machine import ROOT, slug

RESULTS = ROOT / "bench/results"
Row = dict[str, Any]
Key = tuple[str, str, str]
#: (suite, first word of the case, variant) of rows that a report leaves out, since their competitor was given more work
#: than the code it stood for: a row a beam at the root, where STATIC has one a user; in RL logits of every token in
#: passes of which LatentR3 keeps those of targets. With the date from which it is right. An entry
#: goes when the last device that has such rows was measured again.
WITHDRAWN = {("decode", "step", "padded csr"): "2026-11-26", ("train_step", "rl", "published"): "2026-11-26"}
#: What a ratio must show over runs under differing load to be part of a baseline: that many runs, the median at least,
#: the greatest median over the least, the greatest p80 over the least p20. Wall time depends on the machine's cores and
#: is left out. Study: docs/log.md.
STEADY = {"runs": 3, "p50": 1.5, "spread": 1.4, "width": 2.0}


def file_of(facts: dict[str, Any], folder: Path) -> Path:
    name = facts["commit"] + ("-dirty" if facts["dirty"] else "")
    return folder / slug(facts["device"]) / f"{name}.json"


def write(document: dict[str, Any], path: Path) -> None:
    """Replace ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def append(facts: dict[str, Any], rows: list[Row], folder: Path) -> Path:
    """Add a run to the file of its commit and device."""
    path = file_of(facts, folder)
    runs = load(path)["runs"] if path.exists() else []
    write({"device": facts["device"], "commit": facts["commit"], "runs": [*runs, {**facts, "rows": rows}]}, path)
    return path


def load(path: Path) -> dict[str, Any]:
    """A results file, or a baseline made of some.

    Raises:
        ValueError: it is neither.
    """
    try:
        document = json.loads(path.read_text())
        if document["device"] and ("baseline" in document or all("rows" in run for run in document["runs"])):
            return document
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: expected a results file with device, commit and runs, got something else")


def newest(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """By device, the rows that a report shows; each also has its run's facts under ``run``. Quick runs are left out.

    Suites stand in the order of their names, the kinds of work of a suite with the one measured last first, so that
    results which are shown no more have no influence.
    """
    devices: dict[str, dict[tuple[str, str], dict[tuple[str, str], Row]]] = {}
    runs = [run for path in sorted(folder.glob("*/*.json")) for run in load(path)["runs"] if run["tier"] != "quick"]
    for run in sorted(runs, key=lambda run: run["date"]):
        facts = {key: value for key, value in run.items() if key != "rows"}
        for row in run["rows"]:
            word = row["case"].split()[0]
            if _withdrawn(row, run):
                continue
            kinds = devices.setdefault(run["device"], {})
            key = (row["suite"], word if word.isalpha() else "")
            if key in kinds and next(iter(kinds[key].values()))["run"]["commit"] != run["commit"]:
                del kinds[key]
            kinds.setdefault(key, {})[row["case"], row["variant"]] = {**row, "run": facts}
    return {device: _ordered(kinds) for device, kinds in devices.items()}


def _withdrawn(row: Row, run: dict[str, Any]) -> bool:
    until = WITHDRAWN.get((row["suite"], row["case"].split()[0], row["variant"]))
    return until is not None and run["date"] < until


def _ordered(kinds: dict[tuple[str, str], dict[tuple[str, str], Row]]) -> list[Row]:
    """The rows of all kinds of work; both sorts keep the order of what is equal."""
    last_first = sorted(kinds.items(), key=lambda item: next(iter(item[1].values()))["run"]["date"], reverse=True)
    return [row for _, kind in sorted(last_first, key=lambda item: item[0][0]) for row in kind.values()]


def superseded(folder: Path = RESULTS) -> list[Path]:
    """The files of which every row was measured again by newer files of their device.

    A file is newer where its first run came after the other's last one. Quick runs neither count nor need a successor,
    and a file of quick runs alone stays.
    """
    runs = {path: load(path)["runs"] for path in sorted(folder.glob("*/*.json"))}
    runs = {path: [run for run in given if run["tier"] != "quick"] for path, given in runs.items()}
    rows = {
        path: {_key(row) for run in given for row in run["rows"] if not _withdrawn(row, run)}
        for path, given in runs.items()
    }
    dates = {path: [run["date"] for run in given] for path, given in runs.items()}
    found = []
    for path in runs:
        newer = [
            p for p in runs if p.parent == path.parent and dates[p] and dates[path] and min(dates[p]) > max(dates[path])
        ]
        if rows[path] and rows[path] <= set().union(*(rows[p] for p in newer)):
            found.append(path)
    return found


def _key(row: Row) -> Key:
    return row["suite"], row["case"], row["variant"]


def ratios(document: dict[str, Any]) -> dict[Key, dict[str, float]]:
    """(suite, case, competitor) -> competitor / ours pooled over a file's runs.

    p50 is the median of the runs' medians, p20 the least p20, p80 the greatest p80; ``spread`` is the greatest of the
    runs' medians over the least, ``ours_ms`` the median of our medians.
    """
    if "baseline" in document:
        return {_key(row): row["ratio"] for row in document["baseline"]}
    found: dict[Key, list[tuple[Row, float]]] = {}
    for run in document["runs"]:
        ours = {(r["suite"], r["case"]): r["p50_ms"] for r in run["rows"] if "p50_ms" in r and "ratio" not in r}
        for row in run["rows"]:
            if "ratio" in row:
                key = _key(row)
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


def baseline(
    documents: list[dict[str, Any]], without: tuple[str, ...] = (), added: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The ratios that are steady enough to fail a build by, see STEADY, on every device that the documents are of.

    A ratio may differ between processors (products against bandwidth): of several devices the lowest counts. Documents
    are results of several runs, or earlier baselines of other devices. Ratios to the variants ``without`` are left out.
    Variants ``added`` are newer than the earlier baselines: the ratios to them come from the runs alone and may be
    below the least of STEADY, all others from the earlier baselines alone.

    Raises:
        ValueError: too few runs of a device, no ratio that is steady on all, or none to a variant of ``added``.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        for run in document.get("runs", []):
            runs.setdefault(run["device"], []).append(run)
    few = {device: len(own) for device, own in runs.items() if len(own) < STEADY["runs"]}
    if few:
        raise ValueError(f"expected at least {STEADY['runs']} runs of a device, got {few}")
    earlier = [document for document in documents if "baseline" in document and document["device"] not in runs]
    measured = [_steady(device, own, 0.0 if added else STEADY["p50"]) for device, own in sorted(runs.items())]
    parts = earlier + measured
    if added:
        kept = _lowest(earlier, lambda variant: variant not in {*added, *without})
        kept |= _lowest(measured, lambda variant: variant in added)
        if gone := sorted(set(added) - {variant for _, _, variant in kept}):
            raise ValueError(f"added: expected variants with a steady ratio ({STEADY}), got {', '.join(gone)}")
    else:
        kept = _lowest(parts, lambda variant: variant not in without)
    if not kept:
        raise ValueError(f"expected a steady ratio ({STEADY}), got none")
    devices = dict.fromkeys(device for part in parts for device in part["device"].split(", "))
    return {
        "device": ", ".join(devices),
        "commit": ", ".join(dict.fromkeys(commit for part in parts for commit in part["commit"].split(", "))),
        "tier": parts[0]["tier"],
        "baseline": [
            dict(zip(("suite", "case", "variant"), key, strict=True)) | {"ratio": kept[key]} for key in sorted(kept)
        ],
    }


def _lowest(parts: list[dict[str, Any]], wanted: Callable[[str], bool]) -> dict[Key, dict[str, float]]:
    """The ratios to wanted variants that all baselines have, of each the lowest."""
    each = [{key: ratio for key, ratio in ratios(part).items() if wanted(key[2])} for part in parts]
    keys = set.intersection(*(set(part) for part in each)) if each else set()
    return {key: min((part[key] for part in each), key=lambda ratio: ratio["p50"]) for key in keys}


def _steady(device: str, runs: list[dict[str, Any]], least: float) -> dict[str, Any]:
    """A baseline of one device: its steady ratios of ``least`` or more."""
    waits = {(row["suite"], row["case"]) for run in runs for row in run["rows"] if row.get("clock") == "wall"}
    rows = [
        {
            "suite": key[0],
            "case": key[1],
            "variant": key[2],
            "ratio": {k: v if k == "runs" else float(f"{v:.4g}") for k, v in ratio.items()},
        }
        for key, ratio in ratios({"runs": runs}).items()
        if ratio["runs"] == len(runs)
        and key[:2] not in waits
        and ratio["p50"] >= least
        and ratio["spread"] <= STEADY["spread"]
        and ratio["p80"] / ratio["p20"] <= STEADY["width"]
    ]
    commits = sorted({run["commit"] for run in runs})
    return {"device": device, "commit": ", ".join(commits), "tier": runs[0]["tier"], "baseline": rows}


def compare(
    a: dict[str, Any], b: dict[str, Any], threshold: float
) -> tuple[list[dict[str, Any]], list[Key], list[Key]]:
    """What became of each ratio from ``a`` to ``b``, worst first; what only ``a`` has, and what only ``b``.

    A regression is a ratio that fell by more than the factor ``threshold`` and whose p80 in ``b`` is below its p20 in
    ``a``.

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
    changes.sort(key=lambda change: change["change"])
    return changes, sorted(before.keys() - common), sorted(after.keys() - common)
