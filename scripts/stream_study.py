"""Ten updates on a stream of interactions, beside doing nothing and beside retraining from scratch.

    python -m scripts.stream_study --data $FLR_DATA/amazon-cds --runs runs/stream          # all of it; goes on
    python -m scripts.stream_study --data $FLR_DATA/instruments --users 4000               # rows without times: below
    python -m scripts.stream_study --table                                                 # docs/quality.md alone

The published training rows are learned first. What lies after them in time (valid and test) is cut into eleven periods
of as many rows. Rows without times get a clock of their own: what a user did lies evenly between the beginning and the
end, in its order, which is known; who was first of two users is not known, and drawn. The first half of that is learned
first, and the other is cut into periods. A period's rows arrive, with the items that they bring; the newest tenth of
them decides whether ``flr update`` keeps the new model; and each way is then measured on the next period, whose rows it
has not seen, over the items that are known by now. A target that a way cannot give, because it came later, counts as
not found.

    nothing     the model of the beginning, and its items
    update      ``flr update`` from the model before: the period's rows, and replayed ones
    reinforced  the same with ``--rl_steps``
    scratch     the recipe of the beginning on all rows so far

One recipe for all, chosen for the beginning alone. Results go to docs/results/stream_cds.json or
stream_instruments.json and into the tables of docs/quality.md.
"""

import argparse
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

from .marks import filled, with_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/quality.md"
FILES = {"amazon-cds": "stream_cds.json", "instruments": "stream_instruments.json"}
WAYS = ("nothing", "update", "reinforced", "scratch")
UPDATES = ("update", "reinforced")
BUDGET = ("updates", "seeds", "users", "hidden_size", "epochs", "rate", "update_epochs", "update_rate", "share")
BUDGET += ("steps", "rl_steps", "rl_rate", "retrained")
PAIRS = (("nothing", "update"), ("scratch", "update"), ("nothing", "scratch"), ("update", "reinforced"))


def by_time(rows: Interactions) -> Interactions:
    """Rows in the order of their targets' times."""
    assert rows.timestamps is not None
    return rows.select(np.argsort(rows.timestamps, kind="stable"))


def with_clock(rows: Interactions, seed: int = 0) -> Interactions:
    """``rows``, of which those of a user are in order, with times that only this order stands behind.

    The j-th of a user's n rows lies in the j-th of n equal parts of the time, at a place in it that is drawn a user.

    >>> rows = with_clock(Interactions(["u", "v", "u"], [[0], [1], [0, 1]], [1, 2, 2]))
    >>> rows.timestamps[0] < rows.timestamps[2], rows.timestamps.tolist() == sorted(rows.timestamps[[0, 1, 2]].tolist())
    (np.True_, False)
    """
    _, user, count = np.unique(np.asarray(rows.users), return_inverse=True, return_counts=True)
    order = np.argsort(user, kind="stable")
    place = np.empty(len(rows), np.int64)
    place[order] = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    moment = (place + np.random.default_rng(seed).random(len(count))[user]) / count[user]
    return Interactions(rows.users, rows.histories, rows.targets, (moment * 10**9).astype(np.int64))


def of_some(parts: list[Interactions], number: int, seed: int = 0) -> list[Interactions]:
    """Rows of so many users, drawn from all."""
    names = np.unique([user for part in parts for user in part.users])
    drawn = np.random.default_rng(seed).permutation(names)[:number]
    return [part.select(np.isin(np.asarray(part.users), drawn)) for part in parts]


def the_stream(whole: RecDataset, count: int, users: int | None) -> tuple[Interactions, list[Interactions]]:
    """What is learned first, and the periods after it, each in order of time."""
    parts = [whole.train, whole.valid, whole.test]
    parts = parts if users is None else of_some(parts, users)
    if parts[0].timestamps is not None:
        return by_time(parts[0]), periods(by_time(joined(*parts[1:])), count)
    rows = by_time(with_clock(joined(*parts)))
    half = len(rows) // 2
    return rows.select(np.arange(half)), periods(rows.select(np.arange(half, len(rows))), count)


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
        self.titled = whole.catalogue.titles != whole.catalogue.item_ids
        self.start, self.periods = the_stream(whole, args.updates + 1, args.users)
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
                             tie_word_embeddings=False, init_items="title" if self.titled else "random")  # fmt: skip
        thought = FLRConfig(anchor="last", num_factors=4, num_refinements=1, dropout=0.5)
        data = DataOptions(codec="id", max_history=10, views_weight=1.0, views_decay=0.6)
        if (folder / "seconds.json").is_file():
            return float(read_json(folder / "seconds.json")["cpu_seconds"])
        started = time.process_time()
        train(data, self.augment, model, thought, training, dataset)
        seconds = time.process_time() - started
        write_json(folder / "seconds.json", {"cpu_seconds": seconds})
        return seconds

    def update(self, folder: Path, dataset: RecDataset, replay: RecDataset, rl_steps: int) -> tuple[float, Any]:
        """One update in place; CPU seconds, the evaluations before and after among them, and what was decided."""
        a = self.args
        data, old = self.root / "new", self.root / "old"
        dataset.save(data)
        replay.save(old)
        reinforced = {"rl_steps": rl_steps, "rl_learning_rate": a.rl_rate} if rl_steps else {}
        training = UpdateConfig(**self._training(folder), learning_rate=a.update_rate, max_steps=a.steps,
                                embedding_learning_rate=3 * a.update_rate, num_train_epochs=a.update_epochs,
                                reasoner_learning_rate=a.update_rate / 10, warmup_steps=0.1,
                                **reinforced)  # fmt: skip
        options = UpdateOptions(model=str(folder), data=str(data), replay=str(old), replay_share=a.share, card=False)
        started = time.process_time()
        outcome = update(options, self.augment, training)
        return time.process_time() - started, outcome

    def run(self) -> dict[str, Any]:
        """Everything that is not there yet, of the ways that are asked for."""
        file = self.root / "result.json"
        done: dict[str, Any] = read_json(file, 1 << 26) if file.is_file() else {"periods": []}
        if "start" not in done:
            first = over_used_items(self.name, self.items, self.start, self.start.spread(100))
            done["start"] = {"rows": len(self.start), "items": len(first.catalogue)}
            done["start"]["cpu_seconds"] = self.learn(first, self.root / "nothing")
            write_json(file, done)
        for number, coming in enumerate(self.periods[1:][: self.args.until]):
            if number == len(done["periods"]):
                done["periods"].append({"rows": len(coming), "users": list(coming.users), "ways": {}})
            ways = done["periods"][number]["ways"]
            for way in self.args.ways:
                if way in ways or (way == "scratch" and number + 1 not in self.args.retrained):
                    continue
                kept = [k for k, part in enumerate(done["periods"][:number]) if part["ways"].get(way, {}).get("kept")]
                ways[way] = self.way(way, number, max(kept, default=-1))
                write_json(file, done)
                print(number + 1, way, {k: v for k, v in ways[way].items() if k != "values"}, flush=True)
        return done

    def arrived(self, number: int, learned: int) -> tuple[Interactions, Interactions, Interactions]:
        """Rows that update ``learned`` and those before knew (-1: the beginning), those since, and those that decide.

        The rows that decided the last time are learned now, and so are those of updates that were not kept.
        """
        rows = by_time(joined(self.start, *self.periods[: number + 1]))
        ends = len(self.start) + np.cumsum([len(part) for part in self.periods])
        known = [int(end) - len(part) // 10 for end, part in zip(ends, self.periods, strict=True)]
        newest, fresh = known[number], known[learned] if learned >= 0 else len(self.start)
        cuts = ((0, fresh), (fresh, newest), (newest, len(rows)))
        return tuple(rows.select(np.arange(*cut)) for cut in cuts)  # type: ignore[return-value]

    def scratch(self, number: int, folder: Path) -> float:
        """A model of all rows that have arrived; CPU seconds."""
        past, fresh, newest = self.arrived(number, number - 1)
        everything = over_used_items(self.name, self.items, joined(past, fresh), newest)
        return self.learn(everything, folder)

    def way(self, way: str, number: int, learned: int) -> dict[str, Any]:
        """What a period brings, learned in one way, and measured on the next period; ``learned``: see ``arrived``."""
        folder, found = self.root / way, {"cpu_seconds": 0.0}
        if way == "scratch":
            folder = self.root / f"scratch-{number}"
            found["cpu_seconds"] = self.scratch(number, folder)
        if way in UPDATES:
            found |= self.updated(folder, number, learned, self.args.rl_steps if way == "reinforced" else 0)
        values = ranked(folder, self.items, self.periods[number + 1], 256)
        return {**found, "ndcg@10": float(values.mean()), "values": [round(float(v), 5) for v in values]}

    def updated(self, folder: Path, number: int, learned: int, rl_steps: int) -> dict[str, Any]:
        """An update of the model before, which knows what update ``learned`` knew; the first is of the beginning."""
        past, fresh, newest = self.arrived(number, learned)
        new = over_used_items(self.name, self.items, fresh, newest)
        old = over_used_items(self.name, self.items, past, past.select([]))
        if not number:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.root / "nothing", folder)
        seconds, outcome = self.update(folder, new, old, rl_steps)
        facts: dict[str, Any] = {name: outcome.facts[name] for name in ("new_items", "steps")}
        if (rl := outcome.facts.get("rl")) is not None:
            facts |= {f"rl_{name}": rl[name] for name in ("steps", "rows", "kept", "why")}
        return {"cpu_seconds": seconds, "kept": outcome.kept, "why": outcome.why, **facts}


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by period, and of all periods with intervals over users; CPU seconds."""
    parts = seeds[0]["periods"]
    ways = [way for way in WAYS if any(way in part["ways"] for part in parts)]
    every = {way: [k for k, part in enumerate(parts) if way in part["ways"]] for way in ways}

    def mean(way: str, number: int, what: str) -> float:
        return float(np.mean([seed["periods"][number]["ways"][way][what] for seed in seeds]))

    def rows(way: str, numbers: list[int]) -> np.ndarray:
        return np.mean([[v for k in numbers for v in seed["periods"][k]["ways"][way]["values"]] for seed in seeds], 0)

    def users(numbers: list[int]) -> list[str]:
        return [user for k in numbers for user in parts[k]["users"]]

    found: dict[str, Any] = {"periods": [], "seeds": len(seeds), "start": [seed["start"] for seed in seeds]}
    for k, first in enumerate(parts):
        here = [way for way in ways if k in every[way]]
        part = {"rows": first["rows"], **{name: first["ways"]["update"][name] for name in ("new_items", "steps")}}
        for name in ("kept", "rl_kept"):
            known = [way for way in here if name in first["ways"][way]]
            part[name] = {way: [seed["periods"][k]["ways"][way][name] for seed in seeds] for way in known}
        part["cpu_seconds"] = {way: mean(way, k, "cpu_seconds") for way in here}
        part["ndcg@10"] = {way: mean(way, k, "ndcg@10") for way in here}
        found["periods"].append(part)
    found["all"], found["differences"], found["cpu_seconds"] = {}, {}, {}
    for way, numbers in every.items():
        interval = bootstrap_intervals({way: rows(way, numbers)}, users(numbers))[way]
        found["all"][way] = [float(rows(way, numbers).mean()), *interval]
        found["cpu_seconds"][way] = float(np.mean([found["periods"][k]["cpu_seconds"][way] for k in numbers]))
    for a, b in PAIRS:
        if a not in every or b not in every:
            continue
        numbers = [k for k in every[a] if k in every[b]]
        found["differences"][f"{b} - {a}"] = list(paired_difference(rows(a, numbers), rows(b, numbers), users(numbers)))
    return found


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    found, b = report["summary"], report["budget"]
    ways = [way for way in WAYS if way in found["all"]]
    head = [*ways, *(f"CPU seconds, {way}" for way in ways[1:])]
    lines = [f"| update | new items | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    for number, part in enumerate(found["periods"], 1):
        cells = [f"{part['ndcg@10'][way]:.4f}{_mark(part, way)}" if way in part["ndcg@10"] else "" for way in ways]
        cells += [f"{part['cpu_seconds'][way]:.0f}" if way in part["cpu_seconds"] else "" for way in ways[1:]]
        lines.append(f"| {number} | {part['new_items']} | {' | '.join(cells)} |")
    means = [f"{found['all'][way][0]:.4f}" for way in ways]
    means += [f"{found['cpu_seconds'][way]:.0f}" for way in ways[1:]]
    lines.append(f"| **mean of those above** | | {' | '.join(means)} |\n")
    told = [f"{name}: {with_interval(*d[:3], '+')}" for name, d in found["differences"].items()]
    seeds = f"Seed {b['seeds'][0]}" if len(b["seeds"]) == 1 else f"Seeds {', '.join(map(str, b['seeds']))}, means"
    learning = f"{b['update_rate'] / b['rate']:g} of the learning rate"
    rl = ""
    if "reinforced" in ways:
        rl = f" `reinforced`: then {b['rl_steps']} steps of reinforcement, the reasoner's rate {b['rl_rate']:g}."
    lines.append(
        f"Differences where both were measured, paired, with 95 % intervals over users: {'; '.join(told)}. "
        f"{seeds}; 2 layers of {b['hidden_size']}, one token an item, {b['epochs']:g} epochs from scratch. An "
        f"update: {b['update_epochs']:g} epochs over its rows and a share of {b['share']:g} of old ones, at most "
        f"{b['steps']} steps, at {learning}.{rl} CPU seconds are of one thread, those of an update with its "
        "evaluations."
    )
    return "\n".join(lines)


def _mark(part: dict[str, Any], way: str) -> str:
    """What was not kept of an update."""
    told = []
    for name, what in (("kept", ""), ("rl_kept", "RL ")):
        flags = part[name].get(way, [])
        if not all(flags):
            told.append(f"{what}not kept" if len(flags) == 1 else f"{what}kept {sum(flags)} of {len(flags)}")
    return f" ({', '.join(told)})" if told else ""


def write_page(name: str, report: dict[str, Any]) -> None:
    """Put a data set's table between its markers."""
    PAGE.write_text(filled(PAGE.read_text(), f"stream:{name}", table(report)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", default="runs/stream")
    parser.add_argument("--users", type=int, help="Of so many users, drawn. Default: all.")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--until", type=int, help="Only so many of the updates, as for choosing a rate.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["nothing", "update", "scratch"])
    parser.add_argument("--retrained", type=int, nargs="+", help="Updates, from 1, beside which a model learns anew.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--update_epochs", type=float, default=2)
    parser.add_argument("--update_rate", type=float, default=1e-3)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rl_steps", type=int, default=20, help="Steps of reinforcement of the way reinforced.")
    parser.add_argument("--rl_rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, help="Default: the file of the data set in docs/results.")
    parser.add_argument("--table", action="store_true", help="Only write the page, from the results.")
    args = parser.parse_args()
    if args.table:
        for name, file in FILES.items():
            write_page(name, read_json(RESULTS / file))
        return
    args.retrained = args.retrained or list(range(1, args.updates + 1))
    if args.data is None:
        parser.error("data: expected the folder of amazon-cds or instruments, got none")
    studies = [Study(args, seed) for seed in args.seeds]
    report = {"budget": {name: getattr(args, name) for name in BUDGET}, "summary": summary([x.run() for x in studies])}
    name = studies[0].name
    output = args.output or RESULTS / FILES[name]
    write_json(output, report)
    if output.parent == RESULTS:
        write_page(name, read_json(output))


if __name__ == "__main__":
    main()
