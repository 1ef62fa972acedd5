"""How many interests a log tells apart, and what it is worth to know: the tables of docs/quality.md on factors' number.

    python -m scripts.interest_groups --run --data data    # groups of items, a minute; data: as in scripts/study
    python -m scripts.interest_groups --train              # models of several K, 20 minutes of a core
    python -m scripts.interest_groups                      # docs/quality.md alone

The seeds of the generated data are none of those with which ``flr.data.interest_groups`` was made. Catalogues of
several shops are those of real data one behind the other, whose users are different ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flr.cli import sft
from flr.cli.compare import mode_config
from flr.cli.quickstart import QuickstartOptions, settings
from flr.data import CSR, Interactions, RecDataset, interest_groups, load_dataset, planted_dataset
from flr.evaluate import evaluate
from flr.evaluate.metrics import paired_difference, row_metrics
from flr.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/interest_groups.json", ROOT / "docs/quality.md"
MARKED = re.compile(r"(<!-- quality:interest_(\w+) -->\n).*?(<!-- /quality -->)", re.S)
SEEDS = range(20, 40)
INTERESTS = (2, 3, 4, 6)
SIZES = ((200, 1500), (500, 2000))  # items, users
SHOPS = (("instruments",), ("amazon-cds",), ("amazon-office",), ("amazon-cds", "amazon-office"))
SHOPS += (("instruments", "amazon-cds", "amazon-office"),)
TRAINED = (2, 6)  # interests of the data that models of several K learn
FACTORS = (2, 4, 6, 8)
TRAIN_SEEDS = (0, 1)


def joined(parts: list[RecDataset]) -> tuple[Interactions, int]:
    """The training rows of one catalogue that holds the items of all, and how many items that is."""
    users: list[str] = []
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    items = 0
    for part in parts:
        train = part.train
        users += [f"{part.name} {user}" for user in train.users]
        rows += [train.histories.row(n) + items for n in range(len(train))]
        targets.append(train.targets + items)
        items += len(part.catalogue)
    return Interactions(users, CSR.from_rows(rows), np.concatenate(targets)), items


def counted(data: Path) -> Iterator[dict[str, Any]]:
    """What is found in generated data, a line for each kind of them, and in real data."""
    for items, users in SIZES:
        for interests in INTERESTS:
            for mixed in sorted({min(3, interests), interests}):
                found = []
                for seed in SEEDS:
                    made = planted_dataset(items, users, interests, interests_per_user=mixed, seed=seed)
                    found.append(interest_groups(made.train, items).count)
                about = {"items": items, "users": users, "interests": interests, "mixed": mixed}
                yield {**about, "rows": len(made.train), "found": found}
    for names in SHOPS:
        train, size = joined([load_dataset(data / name) for name in names])
        started = time.process_time()
        groups = interest_groups(train, size)
        shares = np.bincount(groups.group[groups.group >= 0], minlength=groups.count) / size
        about = {"shops": names, "items": size, "rows": len(train), "found": [groups.count]}
        yield {**about, "shares": shares.round(3).tolist(), "seconds": round(time.process_time() - started, 2)}


def learned(interests: int) -> RecDataset:
    """The quickstart's data with another number of interests."""
    return planted_dataset(200, 2000, interests, interests_per_user=min(3, interests))


def trained(interests: int, factors: int, seed: int) -> dict[str, Any]:
    """The quickstart's mixture with that many factors, on its data with that many interests."""
    with tempfile.TemporaryDirectory() as folder:
        _, data, augment, model_options, config, args = settings(QuickstartOptions(output_dir=folder))
        dataset = learned(interests)
        config = dataclasses.replace(mode_config("flr-mixture", config), num_factors=factors)
        args = dataclasses.replace(args, seed=seed, data_seed=seed)
        started = time.process_time()
        model, processor, _ = sft.train(data, augment, model_options, config, args, dataset)
        seconds = time.process_time() - started
        ranks = evaluate(model, processor, dataset.test, progress=False).ranks["item"]
    found = {"interests": interests, "factors": factors, "seed": seed, "seconds": round(seconds, 1)}
    return {**found, "ndcg@10": float(row_metrics(ranks)["ndcg@10"].mean()), "ranks": ranks.tolist()}


def counts(report: dict[str, Any]) -> str:
    """How often the number was found, and what was found in real data."""
    lines = ["| generated data, interests (of which a user has) | items | training rows | found | most often |"]
    lines.append("|---|---|---|---|---|")
    for row in report["counts"]:
        if "shops" not in row:
            right = sum(n == row["interests"] for n in row["found"])
            values, often = np.unique(row["found"], return_counts=True)
            cells = [f"{row['interests']} ({row['mixed']})", f"{row['items']:,}", f"{row['rows']:,}"]
            cells += [f"{right} of {len(row['found'])}", str(values[often.argmax()])]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| real data | items | training rows | groups | their shares of the items | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|")
    for row in report["counts"]:
        if "shops" in row:
            shares = ", ".join(f"{share:.0%}" for share in row["shares"])
            cells = [", ".join(row["shops"]), f"{row['items']:,}", f"{row['rows']:,}", str(row["found"][0])]
            lines.append(f"| {' | '.join([*cells, shares, str(row['seconds'])])} |")
    return "\n".join(lines)


def worth(report: dict[str, Any]) -> str:
    """NDCG@10 by interests of the data and factors of the model, each less that of as many factors as interests."""
    lines = ["| interests | factors | trainings | NDCG@10 | less that of as many factors as interests | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|")
    values = {(r["interests"], r["factors"], r["seed"]): row_metrics(np.array(r["ranks"])) for r in report["models"]}
    for interests in TRAINED:
        users = learned(interests).test.users
        for factors in FACTORS:
            rows = [r for r in report["models"] if (r["interests"], r["factors"]) == (interests, factors)]
            if not rows:
                continue
            seeds = [r["seed"] for r in rows if (interests, interests, r["seed"]) in values]
            change = ""
            if factors != interests and seeds:
                own, known = (
                    np.mean([values[interests, k, seed]["ndcg@10"] for seed in seeds], axis=0)
                    for k in (factors, interests)
                )
                d = paired_difference(known, own, users, 2000)
                bold = "**" if d.low > 0 or d.high < 0 else ""
                change = f"{bold}{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}){bold}"
            mean, seconds = (np.mean([r[name] for r in rows]) for name in ("ndcg@10", "seconds"))
            cells = [str(interests), str(factors), str(len(rows)), f"{mean:.4f}", change, f"{seconds:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as the results say."""
    report = read_json(RESULT, 1 << 24)
    made = {"groups": counts, "factors": worth}
    return MARKED.sub(lambda match: f"{match[1]}\n{made[match[2]](report)}\n\n{match[3]}", text)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="Find groups.")
    parser.add_argument("--train", action="store_true", help="Train models; known ones are kept.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="Folder of instruments and the Amazon data.")
    args = parser.parse_args()
    report = read_json(RESULT, 1 << 24) if RESULT.is_file() else {"counts": [], "models": []}
    if args.run:
        report["counts"] = list(counted(args.data))
        write_json(RESULT, report)
    if args.train:
        torch.set_num_threads(1)
        known = {(row["interests"], row["factors"], row["seed"]) for row in report["models"]}
        for job in ((i, k, seed) for seed in TRAIN_SEEDS for i in TRAINED for k in FACTORS):
            if job not in known:
                report["models"].append(trained(*job))
                write_json(RESULT, report)
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
