"""Quality and time of the two scorings on trained models: {trained full, catalogue} × {scored full, catalogue}.

    python scripts/scoring_quality.py --full runs/full-0 runs/full-1 --catalogue runs/catalogue-0 runs/catalogue-1 \
        --data $FLR_DATA/amazon-office --split test --output docs/results/scoring_office_test.json

Folders are those of ``flr sft --normalisation full|catalogue --seed N``. Metrics are means over seeds with 95 %
bootstrap intervals over users (a user's values averaged over seeds first); differences are paired, user by user,
against trained and scored ``full``. Time is a ratio within this process: both scorings rank the same users, in turn.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import numpy as np

import flr
from flr.data import HistoryViews, RecProcessor, load_dataset
from flr.evaluate import EvalResult, evaluate
from flr.evaluate.metrics import bootstrap_intervals, paired_difference, row_metrics
from flr.files import write_json

METRICS = ("hr@5", "hr@10", "ndcg@5", "ndcg@10")
SCORINGS = ("full", "catalogue")
PART = 512  # users ranked by one scoring before the other takes its turn


def ranked(folder, rows, beams, views):
    """Ranks by scoring for one model, and the median ratio of times full / catalogue."""
    model, processor = flr.from_pretrained(folder), RecProcessor.from_pretrained(folder)
    processor.views = processor.views if views is None else HistoryViews(views, 0.6)
    whole = processor.views is None or processor.views.weight == 0
    if whole:
        processor.views = None
    parts, ratios = {s: [] for s in SCORINGS}, []
    # with views the table of single items is made once, so the rows cannot be cut
    step = PART if whole else len(rows)
    for turn, first in enumerate(range(0, len(rows), step)):
        part = rows.select(list(range(first, min(first + step, len(rows)))))
        seconds = {}
        for scoring in SCORINGS if turn % 2 == 0 else SCORINGS[::-1]:
            result: EvalResult = evaluate(
                model, processor, part, scoring=scoring, num_beams=beams, progress=False, samples=1
            )
            parts[scoring].append(result.ranks["item"])
            seconds[scoring] = result.settings["seconds"]
        ratios.append(seconds["full"] / seconds["catalogue"])
    return {s: np.concatenate(p) for s, p in parts.items()}, statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", nargs="+", required=True, help="Models trained with --normalisation full.")
    parser.add_argument("--catalogue", nargs="+", default=[], help="The same seeds with --normalisation catalogue.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="valid", choices=("valid", "test"))
    parser.add_argument("--num_beams", type=int, default=20)
    parser.add_argument("--views", type=float, default=None, help="Weight of views; default as saved, 0 for none.")
    parser.add_argument("--max_users", type=int, default=None, help="That many rows, evenly spread.")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    dataset = load_dataset(args.data)
    rows = getattr(dataset, args.split)
    if args.max_users and args.max_users < len(rows):
        rows = rows.select([i * len(rows) // args.max_users for i in range(args.max_users)])
    values, ratios, seeds = {}, {}, {}
    for trained in SCORINGS:
        for folder in getattr(args, trained):
            ranks, ratios[f"{trained} {Path(folder).name}"] = ranked(folder, rows, args.num_beams, args.views)
            for scoring in SCORINGS:
                found = row_metrics(ranks[scoring])
                values.setdefault((trained, scoring), []).append(found)
                seeds.setdefault(f"{trained}/{scoring}", []).append({m: found[m].mean() for m in METRICS})
    means = {key: {m: np.mean([s[m] for s in group], axis=0) for m in METRICS} for key, group in values.items()}
    report = {
        "data": Path(args.data).name,
        "split": args.split,
        "rows": len(rows),
        "num_beams": args.num_beams,
        "views": args.views,
        "trained/scored": {
            f"{t}/{s}": {
                "mean": {m: float(x.mean()) for m, x in means[t, s].items()},
                "interval": {m: list(i) for m, i in bootstrap_intervals(means[t, s], rows.users).items()},
                "seeds": seeds[f"{t}/{s}"],
            }
            for t, s in means
        },
        "differences": {
            f"{'/'.join(b)} - {'/'.join(a)}": {
                m: list(paired_difference(means[a][m], means[b][m], rows.users)) for m in METRICS
            }
            for a, b in itertools.combinations(means, 2)
        },
        "seconds full / catalogue": ratios,
    }
    write_json(args.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
