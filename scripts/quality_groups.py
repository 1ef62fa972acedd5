"""Where do several factors help? Test NDCG@10 of trained models by group of users, less that of the first one.

    python scripts/quality_groups.py --data data/instruments "one more token=runs/anchor" "mixture=runs/mixture" …
    python scripts/quality_groups.py --table                                       # docs/quality.md alone

Groups are thirds of the rows by the length of the history, by how often the target is a target in training, and by how
many interests a history has: kinds of items, an item's first code, per item of the history. Rows of one value stay
together. Intervals are paired, by bootstrap over users. Results go to docs/results/quality_groups.json and into the
table of docs/quality.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from flr.cli.options import load_trained
from flr.data import RecDataset, load_dataset
from flr.evaluate import evaluate
from flr.evaluate.metrics import paired_difference, row_metrics
from flr.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/quality_groups.json", ROOT / "docs/quality.md"
MARKED = re.compile(r"(<!-- quality:groups -->\n).*?(<!-- /quality -->)", re.S)
PARTS = 3


def traits(dataset: RecDataset) -> dict[str, np.ndarray]:
    """Values [rows] of the test rows by trait."""
    rows, catalogue = dataset.test, dataset.catalogue
    counts = np.bincount(dataset.train.targets, minlength=len(catalogue))
    found = {"items in the history": rows.histories.lengths, "target's count in training": counts[rows.targets]}
    if catalogue.sids is not None:
        _, first = np.unique([codes[0] for codes in catalogue.sids], return_inverse=True)
        each = [len(np.unique(first[rows.histories.row(row)])) for row in range(len(rows))]
        found["kinds of items per item of the history"] = np.array(each) / np.maximum(rows.histories.lengths, 1)
    return found


def groups(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Thirds of the rows by a trait: what they are, and which rows."""
    inner = np.unique(np.quantile(values, np.arange(1, PARTS) / PARTS, method="lower"))
    group, found = np.searchsorted(inner, values, side="left"), []
    for index in np.unique(group):
        own = values[group == index]
        low, high = (f"{x:.2g}" if values.dtype.kind == "f" else f"{x:,}" for x in (own.min(), own.max()))
        found.append((low if low == high else f"{low} to {high}", np.flatnonzero(group == index)))
    return found


def study(folders: dict[str, str], dataset: RecDataset) -> dict[str, Any]:
    values = {}
    for name, folder in folders.items():
        model, processor = load_trained(folder, dataset)
        result = evaluate(model, processor, dataset.test, batch_size=512, progress=False, samples=1)
        values[name] = row_metrics(result.ranks["item"])["ndcg@10"]
    control, users = next(iter(folders)), np.asarray(dataset.test.users)
    rows = []
    for trait, own in traits(dataset).items():
        for label, chosen in groups(own):
            row = {
                "trait": trait,
                "group": label,
                "rows": len(chosen),
                "control": float(values[control][chosen].mean()),
            }
            row["differences"] = {
                name: list(paired_difference(values[control][chosen], x[chosen], users[chosen])[:3])
                for name, x in values.items()
                if name != control
            }
            rows.append(row)
    return {"control": control, "models": list(folders), "test_users": len(users), "rows": rows}


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    others = [name for name in report["models"] if name != report["control"]]
    lines = [f"| | users | {report['control']} | {' | '.join(f'{name}, less' for name in others)} |"]
    lines.append("|---" * (3 + len(others)) + "|")
    for row in report["rows"]:
        cells = []
        for name in others:
            mean, low, high = row["differences"][name]
            text = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
            cells.append(f"**{text}**" if low > 0 or high < 0 else text)
        lines.append(
            f"| {row['trait']}: {row['group']} | {row['rows']:,} | {row['control']:.4f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--table", action="store_true", help="Only write the page, from the result.")
    args = parser.parse_args()
    if not args.table:
        if args.data is None or len(args.models) < 2 or not all("=" in model for model in args.models):
            parser.error("expected --data FOLDER and two models or more as NAME=FOLDER")
        folders = dict(model.rsplit("=", 1) for model in args.models)
        write_json(RESULT, study(folders, load_dataset(args.data)))
    text = PAGE.read_text()
    found = table(read_json(RESULT, 1 << 24))
    PAGE.write_text(MARKED.sub(lambda match: f"{match[1]}\n{found}\n\n{match[2]}", text))


if __name__ == "__main__":
    main()
