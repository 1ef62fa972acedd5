"""How many interests a log tells apart by groups of items: the table of docs/quality.md on the number of factors.

    python -m scripts.interest_groups --run --data data    # a minute; data: as in scripts/study
    python -m scripts.interest_groups                      # docs/quality.md alone

The seeds of the generated data are none of those with which ``flr.data.interest_groups`` was made. Catalogues of
several shops are those of real data one behind the other, whose users are different ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flr.data import CSR, Interactions, RecDataset, interest_groups, load_dataset, planted_dataset
from flr.files import read_json, write_json

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/interest_groups.json", ROOT / "docs/quality.md"
SEEDS = range(20, 40)
INTERESTS = (2, 3, 4, 6)
SIZES = ((200, 1500), (500, 2000))  # items, users
SHOPS = (("instruments",), ("amazon-cds",), ("amazon-office",), ("amazon-cds", "amazon-office"))
SHOPS += (("instruments", "amazon-cds", "amazon-office"),)


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


def table(rows: list[dict[str, Any]]) -> str:
    """How often the number was found, and what was found in real data."""
    lines = ["| generated data, interests (of which a user has) | items | training rows | found | most often |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        if "shops" not in row:
            right = sum(n == row["interests"] for n in row["found"])
            values, often = np.unique(row["found"], return_counts=True)
            cells = [f"{row['interests']} ({row['mixed']})", f"{row['items']:,}", f"{row['rows']:,}"]
            cells += [f"{right} of {len(row['found'])}", str(values[often.argmax()])]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| real data | items | training rows | groups | their shares of the items | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        if "shops" in row:
            shares = ", ".join(f"{share:.0%}" for share in row["shares"])
            cells = [", ".join(row["shops"]), f"{row['items']:,}", f"{row['rows']:,}", str(row["found"][0])]
            lines.append(f"| {' | '.join([*cells, shares, str(row['seconds'])])} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as the results say."""
    return filled(text, "quality:interest_groups", table(read_json(RESULT, 1 << 20)["rows"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="Find groups.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="Folder of instruments and the Amazon data.")
    args = parser.parse_args()
    if args.run:
        write_json(RESULT, {"rows": list(counted(args.data))})
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
