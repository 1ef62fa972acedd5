"""The study's tables in docs/quality.md, from docs/results/study.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flr.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULT, PAGE = ROOT / "docs/results/study.json", ROOT / "docs/quality.md"
MARKED = re.compile(r"(<!-- study:(\w+) -->\n).*?(<!-- /study -->)", re.S)
NAMES = {
    "none": "no thought",
    "anchor": "one more token: the control",
    "latentr3": "one factor",
    "offsets": "K offsets, one sum",
    "flr": "K factors, one sum",
    "offsets-mixture": "K offsets, mixture",
    "flr-mixture": "K factors, mixture",
}
DATA = {"instruments": "instruments", "amazon-cds": "CDs", "amazon-office": "Office"}


def take_over(results: Path, data: Path) -> None:
    """Write docs/results/study.json from the results in a folder."""
    from .summary import summary

    write_json(RESULT, summary(results, data))


def write_page() -> None:
    """Write the tables."""
    PAGE.write_text(page(PAGE.read_text(), read_json(RESULT, 1 << 24)))


def page(text: str, report: dict[str, Any]) -> str:
    """The text with its tables as a result says."""
    made = {
        "tuning": tuning, "instruments": instruments, "pairs": pairs, "groups": groups, "changes": changes,
        "others": others,
    }  # fmt: skip
    return MARKED.sub(lambda match: f"{match[1]}\n{made[match[2]](report)}\n\n{match[3]}", text)


def _interval(values: list[float], sign: str = "", bold: bool = False) -> str:
    mean, low, high = values
    text = f"{mean:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"
    return f"**{text}**" if bold and (low > 0 or high < 0) else text


def _lines(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _order(names: Any) -> list[str]:
    return [name for name in NAMES if name in names]


def _main(report: dict[str, Any]) -> dict[str, Any]:
    return next(t for t in report["tables"] if (t["data"], t["codec"], t["change"]) == ("instruments", "id", ""))


def tuning(report: dict[str, Any]) -> str:
    """NDCG@10 on valid of each trial; the chosen one bold."""
    trials = [run for run in report["runs"] if run["name"] == f"{run['variant']}-{run['setting']}-0"]
    settings = list(dict.fromkeys(run["setting"] for run in trials))
    rows = []
    for variant in _order({run["variant"] for run in trials}):
        cells = {run["setting"]: f"{run['valid']['ndcg@10']:.4f}" for run in trials if run["variant"] == variant}
        best = report["chosen"].get(variant)
        rows.append([NAMES[variant], *(f"**{cells[s]}**" if s == best else cells.get(s, "") for s in settings)])
    return _lines(["valid NDCG@10, seed 0", *settings], rows)


def instruments(report: dict[str, Any]) -> str:
    """The seven models with their chosen settings, alone and beside item-kNN and their own views of single items."""
    table = _main(report)
    knn = table["item-kNN"]
    rows = [["item-kNN", "", "", f"{knn['hr@10'][0]:.4f}", _interval(knn["ndcg@10"]), "", "", "", ""]]
    for name in _order(table["models"]):
        own = table["models"][name]
        row = [NAMES[name], own["setting"], str(own["seeds"]), f"{own['test']['hr@10'][0]:.4f}"]
        row.append(_interval(own["test"]["ndcg@10"]))
        row += [f"{own[way]['ndcg@10'][0]:.4f}" if way in own else "" for way in ("test_neighbours", "test_views")]
        rows.append([*row, f"{own['parameters'] / 1e6:.2f}", f"{own['seconds']:.0f}"])
    heads = ["", "setting", "seeds", "HR@10", "NDCG@10", "with item-kNN", "with single items"]
    about = f"{table['rows']:,} test users, {table['items']:,} items, whole catalogue; {_devices(report)}."
    return f"{_lines([*heads, 'million weights', 'seconds'], rows)}\n\n{about}"


def _devices(report: dict[str, Any]) -> str:
    return " and ".join(report["device"])


def pairs(report: dict[str, Any]) -> str:
    """Differences in test NDCG@10 between models, alone and beside item-kNN; bold where the interval excludes 0."""
    ways, rows = {"test": "alone", "test_neighbours": "both with item-kNN", "test_views": "both with single items"}, []
    for name, other, *found in _main(report)["pairs"]:
        cells = {way: _interval(values, "+", bold=True) for way, *values in found}
        rows.append([NAMES[name], NAMES[other], *(cells.get(way, "") for way in ways)])
    return _lines(["NDCG@10 of", "less that of", *ways.values()], rows)


def groups(report: dict[str, Any]) -> str:
    """Differences to one more token by groups of users; bold where the interval excludes 0."""
    table = _main(report)
    names = [name for name in _order(table["models"]) if name != "anchor"]
    rows = []
    for row in table["groups"]:
        cells = [_interval(row["differences"][name], "+", bold=True) for name in names]
        rows.append([f"{row['trait']}: {row['group']}", f"{row['rows']:,}", f"{row['control']:.4f}", *cells])
    return _lines(["", "users", "one more token", *(f"{NAMES[name]}, less" for name in names)], rows)


def changes(report: dict[str, Any]) -> str:
    """Other numbers of factors and refinements, no regularisers: beside K = 4, T = 1 with them, in the same setting."""
    rows = []
    for table in report["tables"]:
        if table["change"]:
            for name, own in table["models"].items():
                row = [NAMES[name], table["change"].replace("=", " = "), str(own["seeds"])]
                row += [f"{own['test']['hr@10'][0]:.4f}", f"{own['test']['ndcg@10'][0]:.4f}"]
                rows.append([*row, _interval(own["less"], "+", bold=True)])
    rows.sort(key=lambda row: (list(NAMES.values()).index(row[0]), row[1]))
    return _lines(["", "change", "seeds", "HR@10", "NDCG@10", "less that of K = 4, T = 1"], rows)


def others(report: dict[str, Any]) -> str:
    """Semantic IDs, and the two data sets by time."""
    rows = []
    for table in report["tables"]:
        if table["change"] or table is _main(report):
            continue
        what = f"{DATA[table['data']]}, `{table['codec']}`"
        knn = table["item-kNN"]
        rows.append([what, "item-kNN", "", f"{knn['hr@10'][0]:.4f}", _interval(knn["ndcg@10"]), ""])
        less = {name: found[0][1:] for name, other, *found in table["pairs"] if other == "anchor" and found}
        for name in _order(table["models"]):
            own = table["models"][name]
            row = [what, NAMES[name], str(own["seeds"]), f"{own['test']['hr@10'][0]:.4f}"]
            row.append(_interval(own["test"]["ndcg@10"]))
            rows.append([*row, _interval(less[name], "+", bold=True) if name in less else ""])
    return _lines(["data", "", "seeds", "HR@10", "NDCG@10", "less that of one more token"], rows)
