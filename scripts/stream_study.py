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
        if (folder / "seconds.json").is_file():
            return float(read_json(folder / "seconds.json")["cpu_seconds"])
        started = time.process_time()
        train(data, self.augment, model, thought, training, dataset)
        seconds = time.process_time() - started
        write_json(folder / "seconds.json", {"cpu_seconds": seconds})
        return seconds

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
        for number in range(len(done["periods"]), len(self.periods) - 1):
            done["periods"].append(self.period(number))
            write_json(file, done)
            print(
                json.dumps({k: v for k, v in done["periods"][-1].items() if k not in ("values", "users")}), flush=True
            )
        return done

    def arrived(self, number: int) -> tuple[Interactions, Interactions, Interactions]:
        """Rows that were learned before a period, those that it brings to learn, and those that decide.

        The rows that decided the last time are learned now.
        """
        rows = by_time(joined(self.start, *self.periods[: number + 1]))
        tenth = [len(part) // 10 for part in self.periods]
        newest = len(rows) - tenth[number]
        fresh = newest - (len(self.periods[number]) - tenth[number]) - (tenth[number - 1] if number else 0)
        cuts = ((0, fresh), (fresh, newest), (newest, len(rows)))
        return tuple(rows.select(np.arange(*cut)) for cut in cuts)  # type: ignore[return-value]

    def scratch(self, number: int) -> float:
        """A model of all rows that have arrived; CPU seconds."""
        past, fresh, newest = self.arrived(number)
        everything = over_used_items(self.name, self.items, joined(past, fresh), newest)
        return self.learn(everything, self.root / f"scratch-{number}")

    def period(self, number: int) -> dict[str, Any]:
        """One arrival: learn it in each way, and measure on the next period."""
        past, fresh, newest = self.arrived(number)
        new = over_used_items(self.name, self.items, fresh, newest)
        old = over_used_items(self.name, self.items, past, past.select([]))
        seconds = {"nothing": 0.0}
        seconds["update"], outcome = self.update(self.root / "update", new, old, self.root / "update")
        folders = {"nothing": "nothing", "update": "update"}
        if number + 1 in self.args.retrained:
            seconds["scratch"], folders["scratch"] = self.scratch(number), f"scratch-{number}"
        coming = self.periods[number + 1]
        values = {way: ranked(self.root / folder, self.items, coming, 256) for way, folder in folders.items()}
        users = list(coming.users)
        means = bootstrap_intervals(values, users)
        return {
            "rows": len(coming), "kept": outcome.kept, "why": outcome.why, "new_items": outcome.facts["new_items"],
            "steps": outcome.facts["steps"], "cpu_seconds": seconds, "users": users,
            "ndcg@10": {way: [float(x.mean()), *means[way]] for way, x in values.items()},
            "values": {way: [round(float(v), 5) for v in x] for way, x in values.items()},
        }  # fmt: skip


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by period, and of all periods with intervals over users; CPU seconds."""
    parts = seeds[0]["periods"]

    def rows(way: str, numbers: list[int]) -> np.ndarray:
        return np.mean([[v for k in numbers for v in seed["periods"][k]["values"][way]] for seed in seeds], axis=0)

    def users(numbers: list[int]) -> list[str]:
        return [user for k in numbers for user in parts[k]["users"]]

    every = {way: [k for k, part in enumerate(parts) if way in part["values"]] for way in WAYS}
    found: dict[str, Any] = {"periods": [], "seeds": len(seeds), "start": [seed["start"] for seed in seeds]}
    for k, first in enumerate(parts):
        ways = [way for way in WAYS if k in every[way]]
        part = {name: first[name] for name in ("rows", "new_items", "steps")}
        part["kept"] = [seed["periods"][k]["kept"] for seed in seeds]
        part["cpu_seconds"] = {w: float(np.mean([s["periods"][k]["cpu_seconds"][w] for s in seeds])) for w in ways}
        part["ndcg@10"] = {way: float(rows(way, [k]).mean()) for way in ways}
        found["periods"].append(part)
    found["all"], found["differences"], found["cpu_seconds"] = {}, {}, {}
    for way, numbers in every.items():
        interval = bootstrap_intervals({way: rows(way, numbers)}, users(numbers))[way]
        found["all"][way] = [float(rows(way, numbers).mean()), *interval]
        found["cpu_seconds"][way] = float(np.mean([found["periods"][k]["cpu_seconds"][way] for k in numbers]))
    for a, b in (("nothing", "update"), ("scratch", "update"), ("nothing", "scratch")):
        numbers = [k for k in every[a] if k in every[b]]
        found["differences"][f"{b} - {a}"] = list(paired_difference(rows(a, numbers), rows(b, numbers), users(numbers)))
    return found


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    found, b = report["summary"], report["budget"]
    lines = ["| update | new items | nothing | update | scratch | CPU seconds, update | CPU seconds, scratch |"]
    lines.append("|---|---|---|---|---|---|---|")
    for number, part in enumerate(found["periods"], 1):
        cells = [f"{part['ndcg@10'][way]:.4f}" if way in part["ndcg@10"] else "" for way in WAYS]
        cells += [f"{part['cpu_seconds'][way]:.0f}" if way in part["cpu_seconds"] else "" for way in WAYS[1:]]
        kept, of = sum(part["kept"]), len(part["kept"])
        mark = "" if kept == of else " (not kept)" if of == 1 else f" (kept {kept} of {of})"
        lines.append(f"| {number}{mark} | {part['new_items']} | {' | '.join(cells)} |")
    means = [f"{found['all'][way][0]:.4f}" for way in WAYS]
    means += [f"{found['cpu_seconds'][way]:.0f}" for way in WAYS[1:]]
    lines.append(f"| **mean** | | {' | '.join(means)} |\n")
    told = ["{}: {:+.4f} ({:+.4f} to {:+.4f})".format(name, *d[:3]) for name, d in found["differences"].items()]
    seeds = f"Seed {b['seeds'][0]}" if len(b["seeds"]) == 1 else f"Seeds {', '.join(map(str, b['seeds']))}, means"
    learning = f"{b['update_rate'] / b['rate']:g} of the learning rate"
    lines.append(
        f"Differences where both were measured, paired, with 95 % intervals over users: {'; '.join(told)}. "
        f"{seeds}; 2 layers of {b['hidden_size']}, one token an item, {b['epochs']:g} epochs from scratch. An "
        f"update: {b['update_epochs']:g} epochs over its rows and a share of {b['share']:g} of old ones, at most "
        f"{b['steps']} steps, at {learning}. CPU seconds are of one thread, those of an update with both evaluations."
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
    parser.add_argument("--retrained", type=int, nargs="+", help="Updates, from 1, beside which a model learns anew.")
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
    args.retrained = args.retrained or list(range(1, args.updates + 1))
    if args.data is None:
        parser.error("data: expected the folder of amazon-cds, got none")
    results = [Study(args, seed).run() for seed in args.seeds]
    names = ("updates", "seeds", "hidden_size", "epochs", "rate", "update_epochs", "update_rate", "share", "steps")
    names += ("retrained",)
    report = {"budget": {name: getattr(args, name) for name in names}, "summary": summary(results)}
    write_json(args.output, report)
    if args.output == RESULT:
        write_page(report)


if __name__ == "__main__":
    main()
