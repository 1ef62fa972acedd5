"""Ten updates on a stream of interactions, beside doing nothing and beside retraining from scratch.

    python scripts/stream_study.py --data $FLR_DATA/amazon-cds --runs runs/stream          # all of it; goes on
    python scripts/stream_study.py --table                                                 # docs/quality.md alone

The published training rows are learned first. What lies after them in time (valid and test) is cut into eleven periods
of as many rows. A period's rows arrive, with the items that they bring; the newest tenth of them decides whether
``flr update`` keeps the new model; and each way is then measured on the next period, whose rows it has not seen, over
the items that are known by now. A target that a way cannot give, because it came later, counts as not found.

    nothing     the model of the beginning, and its items
    update      ``flr update`` from the model before: the period's rows, and replayed ones
    scratch     the recipe of the beginning on all rows so far

One recipe for all, chosen for the beginning alone. Results go to docs/results/stream_cds.json and into the table of
docs/quality.md.
"""

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from flr.cli.backbone import ModelOptions
from flr.cli.options import AugmentOptions, DataOptions
from flr.cli.sft import train
from flr.cli.update import UpdateOptions, update
from flr.config import FLRConfig
from flr.data import Catalogue, Interactions, RecDataset, RecProcessor, load_dataset
from flr.data.growth import cut, joined, replaced
from flr.evaluate import evaluate
from flr.evaluate.metrics import bootstrap_intervals, paired_difference, row_metrics
from flr.files import read_json, write_json
from flr.model.checkpoint import load_from
from flr.train import SFTConfig, UpdateConfig

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/stream_cds.json", ROOT / "docs/quality.md"
MARKED = re.compile(r"(<!-- stream -->\n).*?(<!-- /stream -->)", re.S)
WAYS = ("nothing", "update", "scratch")


def by_time(rows: Interactions) -> Interactions:
    """Rows in the order of their targets' times."""
    assert rows.timestamps is not None
    return rows.select(np.argsort(rows.timestamps, kind="stable"))


def periods(rows: Interactions, count: int) -> list[Interactions]:
    """``rows``, in order of time, as ``count`` parts of as many rows."""
    return [rows.select(part) for part in np.array_split(np.arange(len(rows)), count)]


def over_used_items(name: str, whole: Catalogue, train: Interactions, valid: Interactions) -> RecDataset:
    """A data set of ``train`` and ``valid`` over the items that they use."""
    parts = (train, valid)
    used = np.unique(np.concatenate([x for part in parts for x in (part.histories.values, part.targets)]))
    places = np.full(len(whole), -1, np.int64)
    places[used] = np.arange(len(used))
    sids = None if whole.sids is None else [whole.sids[item] for item in used]
    attributes = {name: values[used] for name, values in whole.attributes.items()}
    items = [[column[item] for item in used] for column in (whole.item_ids, whole.titles)]
    catalogue = Catalogue(items[0], items[1], sids, attributes)
    return RecDataset(
        catalogue, replaced(train, places), replaced(valid, places), replaced(valid.select([]), places), name
    )


def ranked(folder: Path, whole: Catalogue, rows: Interactions, batch: int) -> np.ndarray:
    """NDCG@10 of each of the ``rows`` (over ``whole``) by the model in ``folder``, float64 [rows]."""
    model, place = load_from(folder)
    processor = RecProcessor.from_pretrained(place)
    index = {item_id: number for number, item_id in enumerate(processor.catalogue.item_ids)}
    later = len(index)
    places = np.array([index.get(item_id, later) for item_id in whole.item_ids])
    known, kept = cut(replaced(rows, places), later)
    values = np.zeros(len(rows))
    if len(known):
        result = evaluate(model, processor, known, batch_size=batch, progress=False, samples=1)
        values[kept] = row_metrics(result.ranks["item"])["ndcg@10"]
    return values


class Study:
    """The stream, the recipe, and what each way gave."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        whole = load_dataset(args.data)
        self.items, self.name = whole.catalogue, whole.name
        self.start = by_time(whole.train)
        self.periods = periods(by_time(joined(whole.valid, whole.test)), args.updates + 1)
        self.root = Path(args.runs) / str(seed)
        self.augment = AugmentOptions(augment_single=0.3, augment_drop_item=0.2, augment_shuffle=0.4,
                                      augment_neighbour=0.7, catalogue_rows=1)  # fmt: skip

    def _training(self, folder: Path) -> dict[str, Any]:
        shared: dict[str, Any] = {"output_dir": str(folder), "per_device_train_batch_size": 256, "seed": self.seed}
        shared |= {"per_device_eval_batch_size": 256, "adam_beta2": 0.98, "weight_decay": 0.01, "use_cpu": True}
        shared |= {"embedding_weight_decay": 0.0, "embedding_dropout": 0.1, "output_dropout": 0.1}
        return {**shared, "disable_tqdm": True, "dataloader_pin_memory": False}

    def learn(self, dataset: RecDataset, folder: Path) -> float:
        """The recipe of the beginning; CPU seconds."""
        a = self.args
        training = SFTConfig(**self._training(folder), learning_rate=a.rate, embedding_learning_rate=3 * a.rate,
                             reasoner_learning_rate=a.rate / 10, lr_scheduler_type="cosine", warmup_steps=0.1,
                             num_train_epochs=a.epochs, eval_strategy="no", load_best_model_at_end=False,
                             save_strategy="no")  # fmt: skip
        model = ModelOptions(hidden_size=a.hidden_size, intermediate_size=2 * a.hidden_size, num_hidden_layers=2,
                             tie_word_embeddings=False, init_items="title")  # fmt: skip
        thought = FLRConfig(anchor="last", num_factors=4, num_refinements=1, dropout=0.5)
        data = DataOptions(codec="id", max_history=10, views_weight=1.0, views_decay=0.6)
        started = time.process_time()
        train(data, self.augment, model, thought, training, dataset)
        return time.process_time() - started

    def update(self, before: Path, dataset: RecDataset, replay: RecDataset, folder: Path) -> tuple[float, Any]:
        """One update; CPU seconds, the evaluations before and after among them, and what was decided."""
        a = self.args
        data, old = self.root / "new", self.root / "old"
        dataset.save(data)
        replay.save(old)
        training = UpdateConfig(**self._training(folder), learning_rate=a.update_rate, max_steps=a.steps,
                                embedding_learning_rate=3 * a.update_rate, num_train_epochs=a.update_epochs,
                                reasoner_learning_rate=a.update_rate / 10, warmup_steps=0.1)  # fmt: skip
        options = UpdateOptions(model=str(before), data=str(data), replay=str(old), replay_share=a.share, card=False)
        started = time.process_time()
        outcome = update(options, self.augment, training)
        return time.process_time() - started, outcome

    def run(self) -> dict[str, Any]:
        """Everything that is not there yet."""
        file = self.root / "result.json"
        done: dict[str, Any] = read_json(file) if file.is_file() else {"periods": []}
        if not done["periods"]:
            first = over_used_items(self.name, self.items, self.start, self.start.spread(100))
            done["start"] = {"rows": len(self.start), "items": len(first.catalogue)}
            done["start"]["cpu_seconds"] = self.learn(first, self.root / "nothing")
            shutil.rmtree(self.root / "update", ignore_errors=True)
            shutil.copytree(self.root / "nothing", self.root / "update")
        waiting = self.start.select([])  # rows that decided the last time, and are learned now
        for number, rows in enumerate(self.periods[:-1]):
            held = len(rows) - len(rows) // 10
            fresh, newest = rows.select(np.arange(held)), rows.select(np.arange(held, len(rows)))
            if number >= len(done["periods"]):
                done["periods"].append(self.period(number, joined(waiting, fresh), newest))
                write_json(file, done)
                print(json.dumps({k: v for k, v in done["periods"][-1].items() if k != "values"}), flush=True)
            waiting = newest
        return done

    def period(self, number: int, fresh: Interactions, newest: Interactions) -> dict[str, Any]:
        """One arrival: learn it in each way, and measure on the next period."""
        past = self.start
        for rows in self.periods[:number]:
            past = joined(past, rows)
        if number:
            past = past.select(np.arange(len(past) - len(self.periods[number - 1]) // 10))  # those of ``fresh``
        new = over_used_items(self.name, self.items, fresh, newest)
        old = over_used_items(self.name, self.items, past, past.select([]))
        seconds = {"nothing": 0.0}
        seconds["update"], outcome = self.update(self.root / "update", new, old, self.root / "update")
        everything = over_used_items(self.name, self.items, joined(past, fresh), newest)
        scratch = self.root / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        seconds["scratch"] = self.learn(everything, scratch)
        coming = self.periods[number + 1]
        values = {way: ranked(self.root / way, self.items, coming, 256) for way in WAYS}
        users = list(coming.users)
        means = bootstrap_intervals(values, users)
        found: dict[str, Any] = {
            "rows": len(coming), "kept": outcome.kept, "why": outcome.why, "new_items": outcome.facts["new_items"],
            "steps": outcome.facts["steps"], "cpu_seconds": seconds, "users": users,
            "ndcg@10": {way: [float(x.mean()), *means[way]] for way, x in values.items()},
            "values": {way: [round(float(v), 5) for v in x] for way, x in values.items()},
        }  # fmt: skip
        return found


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by period, and of all periods with intervals over users; CPU seconds."""
    count = len(seeds[0]["periods"])
    users = [user for period in seeds[0]["periods"] for user in period["users"]]

    def rows(way: str, numbers: range) -> np.ndarray:
        return np.mean([[v for k in numbers for v in seed["periods"][k]["values"][way]] for seed in seeds], axis=0)

    found: dict[str, Any] = {"periods": [], "seeds": len(seeds), "start": [seed["start"] for seed in seeds]}
    for k in range(count):
        part = {"rows": seeds[0]["periods"][k]["rows"], "new_items": seeds[0]["periods"][k]["new_items"]}
        part["kept"] = [seed["periods"][k]["kept"] for seed in seeds]
        part["cpu_seconds"] = {w: float(np.mean([s["periods"][k]["cpu_seconds"][w] for s in seeds])) for w in WAYS}
        part["ndcg@10"] = {way: float(rows(way, range(k, k + 1)).mean()) for way in WAYS}
        found["periods"].append(part)
    values = {way: rows(way, range(count)) for way in WAYS}
    intervals = bootstrap_intervals(values, users)
    found["all"] = {way: [float(x.mean()), *intervals[way]] for way, x in values.items()}
    pairs = (("nothing", "update"), ("scratch", "update"), ("nothing", "scratch"))
    found["differences"] = {f"{b} - {a}": list(paired_difference(values[a], values[b], users)) for a, b in pairs}
    found["cpu_seconds"] = {way: sum(p["cpu_seconds"][way] for p in found["periods"]) for way in WAYS}
    return found


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    found, budget = report["summary"], report["budget"]
    lines = ["| update | new items | nothing | update | scratch | CPU seconds, update | CPU seconds, scratch |"]
    lines.append("|---|---|---|---|---|---|---|")
    for number, part in enumerate(found["periods"], 1):
        means = " | ".join(f"{part['ndcg@10'][way]:.4f}" for way in WAYS)
        seconds = " | ".join(f"{part['cpu_seconds'][way]:.0f}" for way in WAYS[1:])
        kept = sum(part["kept"])
        mark = "" if kept == len(part["kept"]) else f" (kept {kept} of {len(part['kept'])})"
        lines.append(f"| {number}{mark} | {part['new_items']} | {means} | {seconds} |")
    cells = " | ".join("{:.4f} ({:.4f} to {:.4f})".format(*found["all"][way]) for way in WAYS)
    total = found["cpu_seconds"]
    lines.append(f"| **all** | | {cells} | {total['update']:.0f} | {total['scratch']:.0f} |\n")
    told = ["{}: {:+.4f} ({:+.4f} to {:+.4f})".format(name, *d[:3]) for name, d in found["differences"].items()]
    lines.append(f"Differences over all periods, paired, 95 % intervals over users: {'; '.join(told)}.")
    b = budget
    lines.append(
        f"Seeds {', '.join(map(str, b['seeds']))}, means over them; 2 layers of {b['hidden_size']}, one token an item, "
        f"{b['epochs']:g} epochs from scratch. An update: {b['update_epochs']:g} epochs over its rows and a share of "
        f"{b['share']:g} of old ones, at most {b['steps']} steps, at {b['update_rate'] / b['rate']:g} of the learning "
        "rate. CPU seconds of one thread, those of the evaluations before and after included."
    )
    return "\n".join(lines)


def write_page(report: dict[str, Any]) -> None:
    """Put the table between its markers."""
    text = PAGE.read_text()
    PAGE.write_text(MARKED.sub(lambda match: f"{match[1]}\n{table(report)}\n\n{match[2]}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", default="runs/stream")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--update_epochs", type=float, default=2)
    parser.add_argument("--update_rate", type=float, default=1e-3)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="Only write the page, from the result.")
    args = parser.parse_args()
    if args.table:
        write_page(read_json(args.output))
        return
    if args.data is None:
        parser.error("data: expected the folder of amazon-cds, got none")
    results = [Study(args, seed).run() for seed in args.seeds]
    names = ("updates", "seeds", "hidden_size", "epochs", "rate", "update_epochs", "update_rate", "share", "steps")
    report = {"budget": {name: getattr(args, name) for name in names}, "summary": summary(results)}
    write_json(args.output, report)
    if args.output == RESULT:
        write_page(report)


if __name__ == "__main__":
    main()
