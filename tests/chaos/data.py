"""Damaged data files: each is read as what it was, or refused by one error that names it.

python -m tests.chaos.data --cases 1000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from flr.data import RecDataset, RecProcessor

from .attempt import attempt
from .figures import keep
from .mutate_data import FORMS, damage

#: Forms whose files are checked against what was saved: read at all, they hold the same.
#: As it was saved; otherwise, and sound; with one error that names the file; and what must not come.
OUTCOMES = ("equal", "other", "refused", "wrong")
SEALED = ("prepared", "processor-id", "processor-title")
_SECONDS = 30  # a reader that takes longer hangs


def same(one: Any, other: Any) -> bool:
    """Whether two data sets or processors give the same results."""
    if isinstance(one, RecProcessor):
        histories = [[0, 3, 5], []]
        return (
            one.catalogue.digest() == other.catalogue.digest()
            and one.digests() == other.digests()
            and bool((one(histories)["input_ids"] == other(histories)["input_ids"]).all())
        )
    return all(getattr(one, part) == getattr(other, part) for part in ("catalogue", "train", "valid", "test"))


def unsound(read: Any) -> str | None:
    """What is wrong with a data set that was read, or None."""
    if isinstance(read, RecProcessor):
        return None
    assert isinstance(read, RecDataset)
    catalogue, report = read.catalogue, read.report
    for part in (read.train, read.valid, read.test):
        if part.max_index >= len(catalogue) or (len(part) and part.targets.min() < 0):
            return "an item past the catalogue"
        if part.timestamps is not None and part.timestamps.dtype != np.int64:
            return "times that are no integers"
    if not all(catalogue.item_ids) or len(set(catalogue.item_ids)) != len(catalogue):
        return "ids that are empty or repeated"
    "".join([*catalogue.item_ids, *catalogue.titles]).encode()  # valid text
    return None if report.rows_kept + report.rows_bad <= report.rows_read else "more rows kept than read"


def check(form: str, good: Path, seed: int, folder: Path) -> tuple[str, str | None]:
    """One case: ("equal", "other" or "refused", what is wrong or None)."""
    rng = random.Random(f"{form} {seed}")
    shutil.copytree(good, folder)
    done = damage(folder, rng)
    read, fault = attempt(FORMS[form][1], folder, _SECONDS)
    if fault is not None:
        return "refused", f"{done}: {fault}" if fault else None
    if same(read, FORMS[form][1](good)):
        return "equal", None
    wrong = "read with other content than was saved" if form in SEALED else unsound(read)
    return "other", None if wrong is None else f"{done}: {wrong}"


def run(cases: int, seed: int = 0) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """How often each outcome came, by form, and the cases in which something is wrong."""
    outcomes = {name: collections.Counter[str]() for name in OUTCOMES}
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        for form, (make, _) in FORMS.items():
            make(Path(place) / form)
        for case in range(seed, seed + cases):
            form = list(FORMS)[case % len(FORMS)]
            folder = Path(place) / f"case{case}"
            outcome, reason = check(form, Path(place) / form, case, folder)
            outcomes["wrong" if reason else outcome][form] += 1
            if reason is not None:
                wrong.append(f"case {case} ({form}): {reason}")
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to which the figures are added")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    outcomes, wrong = run(args.cases, args.seed)
    for name, forms in outcomes.items():
        print(f"{name}: {dict(forms)}")
    print(*wrong, f"{args.cases} cases, {len(wrong)} wrong", sep="\n")
    keep(args.json, outcomes)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
