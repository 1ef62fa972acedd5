"""Semantic IDs made from co-occurrence beside published ones: one model, one budget, leave-one-out, whole catalogue.

    python -m scripts.sid_study --data $FLR_DATA/instruments --runs runs/sids          # all of it; goes on
    python -m scripts.sid_study --table                                                # docs/semantic-ids.md alone

The data: ``inter.json`` (user -> items in order of time) and ``index.json`` (item -> code tokens). A user's last item
is tested and the one before validates; every earlier one is a target of training after its prefix. Sets of codes:

    published       those of index.json
    cooccurrence    residual k-means, as many levels, on the truncated SVD of co-occurrence in all training rows
    random          as many levels of codes drawn at random: what a code is worth that says nothing

Each is learned from scratch by the same small model, in the same number of steps, from the training rows of the same
users, and evaluated on the test rows of the same users. Nothing is tuned. Results go to docs/results/sid_study.json and
into the table of docs/semantic-ids.md.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from flr.cli.backbone import ModelOptions
from flr.cli.options import AugmentOptions, DataOptions
from flr.cli.sft import train
from flr.config import FLRConfig
from flr.data import Catalogue, RecDataset, load_dataset
from flr.evaluate import EvalResult, evaluate, evaluate_scorer
from flr.evaluate.baselines import ItemKNN
from flr.files import read_json, write_json
from flr.train import SFTConfig

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/sid_study.json", ROOT / "docs/semantic-ids.md"
SETS = ("published", "cooccurrence", "random")
METRICS = ("hr@10", "ndcg@10")


def with_codes(dataset: RecDataset, name: str, seed: int) -> tuple[RecDataset, dict]:
    """``dataset`` with the codes of that set, and what is known of them."""
    from flr.sids import code_names, code_report, embed_items, fit_codes

    catalogue = dataset.catalogue
    levels = len(catalogue.sids[0])
    facts = {}
    if name == "published":
        sids = catalogue.sids
    elif name == "random":
        sids = code_names(np.random.default_rng(seed).integers(0, 256, (len(catalogue), levels)))
    else:
        started = time.process_time()
        embedded = embed_items(dataset, "cooccurrence", seed=seed)
        books = fit_codes(embedded.values, levels=levels, codes=256, seed=seed)
        codes = books.encode(embedded.values)
        sids = code_names(codes)
        facts = {"cpu_seconds": round(time.process_time() - started, 1)}
        facts |= {"relative_error": books.relative_errors(embedded.values, codes)}
    facts |= code_report(sids)
    named = Catalogue(catalogue.item_ids, catalogue.titles, sids)
    return RecDataset(named, dataset.train, dataset.valid, dataset.test, dataset.name), facts


def run(dataset: RecDataset, name: str, args: argparse.Namespace) -> dict:
    """Train and evaluate one set of codes; goes on where an earlier call was stopped."""
    folder = Path(args.runs) / f"{name}-{args.seed}"
    whole, facts = with_codes(dataset, name, args.seed)
    chosen = set(list(dict.fromkeys(whole.test.users))[:: args.every])
    few = [part.select(np.array([u in chosen for u in part.users])) for part in (whole.train, whole.valid, whole.test)]
    some = RecDataset(whole.catalogue, *few, name=whole.name)
    training = SFTConfig(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        normalisation="catalogue",
        eval_strategy="no",
        load_best_model_at_end=False,
        save_strategy="steps",
        save_steps=max(1, args.steps // 5),
        save_total_limit=1,
        seed=args.seed,
        use_cpu=True,
        disable_tqdm=True,
    )
    sizes = {"hidden_size": args.hidden_size, "intermediate_size": 4 * args.hidden_size}
    model_options = ModelOptions(num_hidden_layers=2, num_attention_heads=4, **sizes)
    data = DataOptions(codec="sid", max_history=args.max_history)
    model, processor, summary = train(data, AugmentOptions(), model_options, FLRConfig(variant="none"), training, some)
    result = evaluate(model, processor, some.test, num_beams=20, output_dir=folder / "test", name=name)
    facts |= {"train_rows": len(some.train), "test_rows": len(some.test), "steps": summary["steps"]}
    facts |= {"folder": str(folder.name)}
    return facts | measured(result)


def measured(result: EvalResult) -> dict:
    """Means and intervals on the test rows."""
    metrics, intervals = result.metrics["item"], result.intervals["item"]
    return {m: {"mean": metrics[m], "interval": list(intervals[m])} for m in METRICS}


def table(report: dict) -> str:
    """The results as a table in Markdown, with the budget in a sentence below."""
    head = "| codes | HR@10 | NDCG@10 | items that share an ID | largest group | perplexity by level |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, facts in report["sets"].items():
        cells = [
            f"{facts[m]['mean']:.4f} [{facts[m]['interval'][0]:.4f}, {facts[m]['interval'][1]:.4f}]" for m in METRICS
        ]
        if "levels" in facts:
            used = " ".join(f"{level['perplexity']:.0f}" for level in facts["levels"])
            cells += [f"{facts['share_sharing']:.2%}", str(facts["largest_group"]), used]
        else:
            cells += ["", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for pair, difference in report["differences"].items():
        mean, low, high, p = difference
        lines.append(f"\n{pair}, NDCG@10: {mean:+.4f} [{low:+.4f}, {high:+.4f}], p = {p:.3f}.")
    b, first = report["budget"], next(iter(report["sets"].values()))
    lines.append(
        f"\nOne seed ({b['seed']}), a model of 2 layers of {b['hidden_size']} without a thought, {b['steps']} steps"
        f" of {b['batch_size']} rows at a learning rate of {b['learning_rate']:g}, {first['train_rows']:,} training"
        f" rows and {first['test_rows']:,} test rows: every {b['every']}th user. Intervals: 95 %, bootstrap over users."
    )
    return "\n".join(lines)


def page(text: str, result: Path = RESULT) -> str:
    """The page with its table as the results say."""
    return filled(text, "sid_study", table(read_json(result)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", default="runs/sids")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--max_history", type=int, default=10)
    parser.add_argument("--every", type=int, default=4, help="Every n-th user, for training and test alike.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="Only write the page, from the result.")
    args = parser.parse_args()
    if args.table:
        PAGE.write_text(page(PAGE.read_text(), args.output))
        return
    if args.data is None:
        parser.error("data: expected the folder of inter.json and index.json, got none")
    dataset = load_dataset(args.data, "sequences", max_history=args.max_history)
    names = ("steps", "batch_size", "learning_rate", "hidden_size", "max_history", "every", "seed")
    report = {"budget": {name: getattr(args, name) for name in names}, "sets": {}, "differences": {}}
    for name in args.sets:
        report["sets"][name] = run(dataset, name, args)
        write_json(args.output, report)
    results = {name: EvalResult.load(Path(args.runs) / report["sets"][name]["folder"] / "test") for name in args.sets}
    first = results[args.sets[0]]
    chosen = set(first.users)
    rows = dataset.test.select(np.array([user in chosen for user in dataset.test.users]))
    knn = evaluate_scorer(ItemKNN(dataset.train, len(dataset.catalogue)), rows, dataset.catalogue)
    report["sets"]["item-kNN, all training rows"] = measured(knn)
    for name in args.sets[1:]:
        report["differences"][f"{name} - {args.sets[0]}"] = list(first.difference(results[name]))
    write_json(args.output, report)
    print(json.dumps(report, indent=1))
    if args.output == RESULT:
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
