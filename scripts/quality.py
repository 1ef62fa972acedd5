"""Trained models beside each other and beside item-kNN on a test split, each alone and mixed with item-kNN.

    flr sft --config examples/instruments.yaml --data data/instruments --variant anchor --output_dir runs/anchor
    python scripts/quality.py --data data/instruments anchor=runs/anchor "K factors, one sum=runs/flr" …
    python scripts/quality.py --quickstart quickstart                              # what flr quickstart --seeds 3 found
    python scripts/quality.py --table                                              # docs/quality.md alone

The first model is the control that the others' differences are to. Of several seeds give NAME=FOLDER,FOLDER: metrics
of a user are averaged over seeds before users are resampled. The weight of item-kNN is chosen by NDCG@10 on the valid
split, for each model; the test split is looked at once. Results go to docs/results/quality_instruments.json, those of
the quickstart to docs/results/quickstart.json, and both into the tables of docs/quality.md.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from flr.cli.options import load_trained
from flr.cli.quickstart import NAMES
from flr.data import NeighbourTable, RecDataset, load_dataset
from flr.evaluate import evaluate_scorer, fit_neighbours
from flr.evaluate.baselines import ItemKNN
from flr.evaluate.metrics import paired_difference, row_metrics
from flr.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/quality.md"
RESULT, QUICKSTART = RESULTS / "quality_instruments.json", RESULTS / "quickstart.json"
MARKED = re.compile(r"(<!-- quality:(instruments|quickstart) -->\n).*?(<!-- /quality -->)", re.S)
WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
METRICS = ("hr@10", "ndcg@10")


def measured(folder: str, dataset: RecDataset) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """What is written of one model, and metrics of each test user: alone, and with item-kNN."""
    model, processor = load_trained(folder, dataset)
    table = NeighbourTable.fit(dataset.train, len(dataset.catalogue), top=500)
    valid = fit_neighbours(model, processor, table, dataset.valid, WEIGHTS)
    by_weight = valid.metrics["ndcg@10"].mean(1).tolist()
    test = fit_neighbours(model, processor, table, dataset.test, sorted({0.0, valid.best}))
    file = Path(folder) / "trainer_state.json"
    state = read_json(file, 1 << 26) if file.is_file() else {}
    facts = {"weight": valid.best, "valid_ndcg@10": dict(zip(map(str, WEIGHTS), by_weight, strict=True))}
    thought = {name: value for name, value in model.config.flr.items() if isinstance(value, (str, int, float))}
    facts |= {"scoring": processor.scoring, "thought": thought}
    facts |= {"epochs": state.get("epoch"), "parameters": sum(p.numel() for p in model.parameters())}
    users = {"alone": {m: test.metrics[m][0] for m in METRICS}, "mixed": {m: test.metrics[m][-1] for m in METRICS}}
    return facts, users


def study(models: dict[str, list[str]], dataset: RecDataset) -> dict[str, Any]:
    """All models, their differences to the first, and item-kNN."""
    knn = evaluate_scorer(ItemKNN(dataset.train, len(dataset.catalogue)), dataset.test, dataset.catalogue)
    rows = {"item-kNN": {"knn": {m: row_metrics(knn.ranks["item"])[m] for m in METRICS}}}
    facts: dict[str, Any] = {}
    for name, folders in models.items():
        parts = [measured(folder, dataset) for folder in folders]
        facts[name] = [one for one, _ in parts]
        rows[name] = {
            way: {m: np.mean([users[way][m] for _, users in parts], axis=0) for m in METRICS}
            for way in ("alone", "mixed")
        }
    control = next(iter(models))
    out: dict[str, Any] = {"rows": len(dataset.test), "items": len(dataset.catalogue), "control": control, "models": {}}
    clusters = dataset.test.users
    out["order"] = ["item-kNN", *models]
    for place, name in enumerate(models):
        for other in list(models)[:place]:
            pair = (rows[which]["alone"]["ndcg@10"] for which in (other, name))
            out.setdefault("pairs", []).append([name, other, *paired_difference(*pair, clusters)[:3]])
    for name, ways in rows.items():
        entry: dict[str, Any] = {"runs": facts.get(name, [])}
        for way, values in ways.items():
            zero = np.zeros(len(dataset.test))
            entry[way] = {m: list(paired_difference(zero, values[m], clusters)[:3]) for m in METRICS}
            base = rows["item-kNN"]["knn"] if way == "knn" else rows[control][way]
            entry[way]["difference"] = list(paired_difference(base["ndcg@10"], values["ndcg@10"], clusters)[:3])
            entry[way]["to_knn"] = list(
                paired_difference(rows["item-kNN"]["knn"]["ndcg@10"], values["ndcg@10"], clusters)[:3]
            )
        out["models"][name] = entry
    return out


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    columns = ("", "seeds", "HR@10", "NDCG@10", "less that of the control")
    columns += ("with item-kNN: HR@10", "NDCG@10", "less that of item-kNN")
    head = f"| {' | '.join(columns)} |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for name in report["order"]:
        entry = report["models"][name]
        alone, mixed = entry.get("alone", entry.get("knn")), entry.get("mixed")
        cells = [str(len(entry["runs"]) or ""), f"{alone['hr@10'][0]:.4f}", _interval(alone["ndcg@10"])]
        cells.append("" if name in (report["control"], "item-kNN") else _interval(alone["difference"], "+"))
        cells += (
            ["", "", ""]
            if mixed is None
            else [f"{mixed['hr@10'][0]:.4f}", _interval(mixed["ndcg@10"]), _interval(mixed["to_knn"], "+")]
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rows, items = f"{report['rows']:,}", f"{report['items']:,}"
    about = f"{rows} test users, {items} items, whole catalogue, 95 % intervals by bootstrap over users."
    lines.append(f"\n{about} Control: {report['control']}.")
    lines += ["", "| NDCG@10 of | less that of | difference |", "|---|---|---|"]
    lines += [f"| {name} | {other} | {_interval(values, '+')} |" for name, other, *values in report["pairs"]]
    return "\n".join(lines)


def _interval(values: list[float], sign: str = "") -> str:
    mean, low, high = values
    return f"{mean:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"


def quickstart_result(report: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a ``quickstart.json``."""
    rows = [{**row, "metrics": {m: round(row["metrics"][m], 6) for m in METRICS}} for row in report["rows"]]
    kept = [{name: row[name] for name in ("mode", "seed", "metrics")} for row in rows]
    nmi = {mode: {name: round(found[name], 6) for name in ("nmi", "chance")} for mode, found in report["nmi"].items()}
    return {"rows": kept, "nmi": nmi}


def quickstart_table(report: dict[str, Any]) -> str:
    """What ``flr quickstart`` found: means over seeds with the lowest and the highest, and NMI of the first seed."""
    lines = ["| mode | what it is | seeds | HR@10 | NDCG@10 | NMI, by chance |", "|---|---|---|---|---|---|"]
    for mode in dict.fromkeys(row["mode"] for row in report["rows"]):
        runs = [row["metrics"] for row in report["rows"] if row["mode"] == mode]
        spans = []
        for metric in METRICS:
            values = [run[metric] for run in runs]
            ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            spans.append(f"{np.mean(values):.3f}{ends}")
        found = report["nmi"].get(mode)
        agreement = f"{found['nmi']:.3f}, {found['chance']:.3f}" if found else ""
        lines.append(f"| {mode} | {NAMES[mode]} | {len(runs)} | {' | '.join(spans)} | {agreement} |")
    lines.append("\nThe test split: means over seeds, with the lowest and the highest; NMI of seed 0.")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as the results say."""
    made = {
        "instruments": table(read_json(RESULT, 1 << 24)),
        "quickstart": quickstart_table(read_json(QUICKSTART, 1 << 24)),
    }
    return MARKED.sub(lambda match: f"{match[1]}\n{made[match[2]]}\n\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER[,FOLDER…]")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--quickstart", type=Path, help="Only take over what flr quickstart left in this folder.")
    parser.add_argument("--table", action="store_true", help="Only write the page, from the results.")
    args = parser.parse_args()
    if args.quickstart:
        write_json(QUICKSTART, quickstart_result(read_json(args.quickstart / "quickstart.json", 1 << 24)))
    elif not args.table:
        if args.data is None or not args.models or not all("=" in model for model in args.models):
            parser.error("expected --data FOLDER and models as NAME=FOLDER")
        pairs = (model.rsplit("=", 1) for model in args.models)
        report = study({name: folders.split(",") for name, folders in pairs}, load_dataset(args.data))
        write_json(args.output, report)
        print(json.dumps(report["models"], indent=1))
    if args.output == RESULT:
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
