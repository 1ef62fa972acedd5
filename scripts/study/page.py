"""The study's tables in docs/quality.md, from docs/results/study.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flr.evaluate.baselines import ItemKNN, LinearItems
from flr.files import read_json, write_json

from ..marks import filled, with_interval
from .kept import PARTS, keep, of_part
from .summary import COMPARED, COMPARED_PAIRS, summary

ROOT = Path(__file__).resolve().parents[2]
RESULT, PAGE = ROOT / "docs/results/study.json", ROOT / "docs/quality.md"
#: Trainings by the same recipe before the study, whose ranks are not kept.
EARLIER = ROOT / "docs/results/study_earlier.json"
NAMES = {
    "none": "no thought",
    "anchor": "one more token",
    "latentr3": "one factor",
    "offsets": "K offsets, one sum",
    "flr": "K factors, one sum",
    "offsets-mixture": "K offsets, mixture",
    "flr-mixture": "K factors, mixture",
}
DATA = {"instruments": "instruments", "amazon-cds": "CDs", "amazon-office": "Office"}


def take_over(results: list[Path], data: Path) -> None:
    """Write docs/results/study.json from the results in some folders."""
    write_json(RESULT, summary(results, data))


def take_over_part(results: list[Path], data: Path, part: str) -> None:
    """Write docs/results/study_PART.json from the trainings of that part, in some folders and kept before.

    docs/results/study_PART/ keeps them, so that a table has all seeds, whenever each was trained.
    """
    kept = RESULT.with_name(f"study_{part}")
    keep(results, kept, part)
    write_json(kept.with_suffix(".json"), of_part([kept], data, part))


def write_page() -> None:
    """Write the tables."""
    PAGE.write_text(page(PAGE.read_text()))


def report() -> dict[str, Any]:
    """What the tables are made of."""
    found = {**read_json(RESULT, 1 << 24), "earlier": read_json(EARLIER, 1 << 20)["trainings"]}
    return found | {part: read_json(RESULT.with_name(f"study_{part}.json"), 1 << 22)["tables"] for part in PARTS}


def page(text: str) -> str:
    """The text with its tables as the results say."""
    made = {
        "tuning": tuning, "instruments": instruments, "pairs": pairs, "repeated": repeated, "groups": groups,
        "others": others, "changes": changes, "linear": linear,
        "taught": taught,
    }  # fmt: skip
    found = report()
    for name, table in made.items():
        text = filled(text, f"study:{name}", table(found))
    return text


def _interval(values: list[float], sign: str = "", bold: bool = False) -> str:
    mean, low, high = values
    text = with_interval(mean, low, high, sign)
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
    """The seven models with their chosen settings, alone and beside item-kNN."""
    table = _main(report)
    rows = [[name, "", "", *own, "", "", "", ""] for name, own in _baselines(table)]
    for name in _order(table["models"]):
        own = table["models"][name]
        row = [NAMES[name], own["setting"], str(own["seeds"]), f"{own['test']['hr@10'][0]:.4f}"]
        row.append(_interval(own["test"]["ndcg@10"]))
        row += [f"{own['test_neighbours']['ndcg@10'][0]:.4f}", _interval(own["less_knn"]["test_neighbours"], "+", True)]
        rows.append([*row, f"{own['parameters'] / 1e6:.1f}", f"{own['seconds']:.0f}"])
    heads = ["", "setting", "trainings", "HR@10", "NDCG@10", "with item-kNN: NDCG@10", "less that of item-kNN"]
    about = f"{table['rows']:,} test users, {table['items']:,} items, whole catalogue, 95 % intervals over users. "
    about += f"Seconds of training are of one {_device(table['device'])} that several trainings shared."
    return f"{_lines([*heads, 'million weights', 'seconds'], rows)}\n\n{about}"


def _baselines(table: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """HR@10 and NDCG@10 of item-kNN and of the linear model."""
    found = [(name, table[name]) for name in (ItemKNN.name, LinearItems.name)]
    return [(name, [f"{own['hr@10'][0]:.4f}", _interval(own["ndcg@10"])]) for name, own in found]


def _device(names: list[str]) -> str:
    return " and ".join(name if name != "cpu" else "CPU" for name in names)


def pairs(report: dict[str, Any]) -> str:
    """Differences in test NDCG@10 between models, alone and beside item-kNN; bold where the interval excludes 0."""
    ways, rows = {"test": "alone", "test_neighbours": "both with item-kNN"}, []
    for name, other, *found in _main(report)["pairs"]:
        cells = {way: _interval(values, "+", bold=True) for way, *values in found}
        rows.append([NAMES[name], NAMES[other], *(cells.get(way, "") for way in ways)])
    return _lines(["NDCG@10 of", "less that of", *ways.values()], rows)


def repeated(report: dict[str, Any]) -> str:
    """Trainings of one setting and seed, with differences over users; the recipe's mean, over users and seeds."""
    found = report["repeated"]
    columns = [*report["earlier"], *found["trainings"]]
    heads = [f"{one['setting']}, seed {one['seed']}, {_device(one['device'])}" for one in columns]
    heads = [f"{head}, earlier" if place < len(report["earlier"]) else head for place, head in enumerate(heads)]
    if len(found["recipe"]["test"]) > 1:
        columns.append(found["recipe"])
        heads.append(f"recipe, mean of seeds {', '.join(map(str, found['seeds']))}")
    means = [{name: f"{value:.4f}" for name, value in one["test"].items()} for one in columns]
    rows = [[NAMES[name], *(own.get(name, "") for own in means)] for name in _order(COMPARED)]
    pairs = [{(a, b): _interval(values, "+", bold=True) for a, b, *values in one["pairs"]} for one in columns]
    for pair, head in zip(COMPARED_PAIRS, _pair_heads(COMPARED_PAIRS), strict=True):
        rows.append([head, *(own.get(pair, "") for own in pairs)])
    return _lines(["test NDCG@10", *heads], rows)


def _pair_heads(pairs: Any) -> list[str]:
    return [f"{NAMES[name]}, less {NAMES[other]}" for name, other, *_ in pairs]


def groups(report: dict[str, Any]) -> str:
    """Differences by groups of users; bold where the interval excludes 0."""
    table = _main(report)
    heads, rows = _pair_heads(table["groups"][0]["pairs"]), []
    for row in table["groups"]:
        about = [f"{row['trait']}: {row['group']}", f"{row['rows']:,}", f"{row['control']:.4f}"]
        rows.append([*about, *(_interval(values, "+", bold=True) for _, _, *values in row["pairs"])])
    return _lines(["", "users", NAMES["anchor"], *heads], rows)


def others(report: dict[str, Any]) -> str:
    """Other data and codecs, where a mixture was trained: with one that is not, nothing is asked about factors."""
    rows, pairs = [], []
    later = {(table["data"], table["codec"]): table for table in report["others"]}  # of more seeds
    for table in report["tables"]:
        if table["change"] or table is _main(report) or "flr-mixture" not in table["models"]:
            continue
        table = later.get((table["data"], table["codec"]), table)
        what = f"{DATA[table['data']]}, `{table['codec']}`"
        rows += [[what, name, "", "", *own, ""] for name, own in _baselines(table)]
        less = {name: own["less_anchor"] for name, own in table["models"].items() if "less_anchor" in own}
        for name in _order(table["models"]):
            own = table["models"][name]
            row = [what, NAMES[name], str(own["seeds"]), f"{own['valid']:.4f}", f"{own['test']['hr@10'][0]:.4f}"]
            row.append(_interval(own["test"]["ndcg@10"]))
            rows.append([*row, _interval(less[name], "+", bold=True) if name in less else ""])
        several = {name for name, own in table["models"].items() if own["seeds"] > 1}
        for name, other, (_, *found), *_ in table["pairs"]:
            if {name, other} <= several and other != "anchor":
                pairs.append([what, NAMES[name], NAMES[other], _interval(found, "+", True)])
    heads = ["data", "", "trainings", "valid NDCG@10", "test HR@10", "NDCG@10", "less that of one more token"]
    return f"{_lines(heads, rows)}\n\n{_lines(['data', 'NDCG@10 of', 'less that of', ''], pairs)}"


def linear(report: dict[str, Any]) -> str:
    """Trainings that were mixed with the linear model, too, by setting, and their differences."""
    return _beside_linear(report["linear"])


def taught(report: dict[str, Any]) -> str:
    """The same of trainings with a teacher, and what they took."""
    (table,) = report["taught"]
    took = ", ".join(f"{NAMES[name]} {table['models'][name]['seconds']:,.0f}" for name in _order(table["models"]))
    about = f"Seconds of training, {_device(table['device'])}, one core each, beside a second training or more: {took}."
    return f"{_beside_linear({'taught': table})}\n\n{about}"


def _beside_linear(tables: dict[str, Any]) -> str:
    rows = [[name, "", "", "", *own, *[""] * 6] for name, own in _baselines(next(iter(tables.values())))]
    for setting, table in tables.items():
        for name in _order(table["models"]):
            own = table["models"][name]
            row = [NAMES[name], setting, ", ".join(str(seed) for seed, _ in own["each"]), f"{own['valid']:.4f}"]
            row += [f"{own['test']['hr@10'][0]:.4f}", _interval(own["test"]["ndcg@10"])]
            row += [f"{own['test_views']['hr@10'][0]:.4f}", _interval(own["test_views"]["ndcg@10"])]
            row += [f"{own['test_neighbours']['ndcg@10'][0]:.4f}", f"{own['test_linear']['hr@10'][0]:.4f}"]
            row += [_interval(own["test_linear"]["ndcg@10"]), _interval(own["less_linear"]["test_linear"], "+", True)]
            rows.append(row)
    heads = ["", "setting", "seeds", "valid NDCG@10", "test HR@10", "NDCG@10", "with own views: HR@10", "NDCG@10"]
    heads += ["with item-kNN: NDCG@10", "with linear: HR@10", "NDCG@10", "less that of linear"]
    ways, others = {"test": "alone", "test_views": "both with own views", "test_linear": "both with linear"}, []
    for setting, table in tables.items():
        for name, other, *found in table["pairs"]:
            cells = {way: _interval(values, "+", bold=True) for way, *values in found}
            others.append([setting, NAMES[name], NAMES[other], *(cells.get(way, "") for way in ways)])
    return f"{_lines(heads, rows)}\n\n{_lines(['setting', 'NDCG@10 of', 'less that of', *ways.values()], others)}"


def changes(report: dict[str, Any]) -> str:
    """One change of the recipe at a time, beside the recipe with the same seeds; bold where the interval excludes 0."""
    found = {table["change"]: table["models"]["flr-mixture"] for table in report["tables"] if table["change"]}
    rows = []
    for change, own in sorted(found.items()):
        seeds, each = (", ".join(x) for x in zip(*((str(s), f"{x:.4f}") for s, x in own["each"]), strict=True))
        name = "no regularisers" if change == "plain" else change.replace("=", " = ")
        row = [name, seeds, f"{own['valid']:.4f}", each, f"{own['unchanged']:.4f}"]
        rows.append([*row, _interval(own["less"], "+", bold=True), f"{own['parameters'] / 1e6:.2f}"])
    heads = [
        "K factors, mixture, with",
        "seeds",
        "valid NDCG@10",
        "test NDCG@10",
        "the recipe, same seeds",
        "difference",
    ]
    return _lines([*heads, "million weights"], rows)
