"""``flr prepare``: raw logs into a folder that every other command reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import COUNT, COUNT_FROM_ZERO, PROBABILITY, Numbers, check_numbers, option

from . import voice
from .parsing import emit, parse

if TYPE_CHECKING:
    from flr.data.sources import Progress

ABOUT = "Turn logs into a prepared folder: flr prepare KIND --source … --output …; docs/data.md describes every kind."
KINDS = ("movielens", "amazon", "steam", "yelp", "goodreads", "recbole", "parquet", "csv", "sequences")
_CORE = 5  # k of the k-core filter where nobody says


@dataclass
class PrepareOptions:
    """What to read and how to split it."""

    source: str | None = option(None, "File, folder or, for public data sets, zip archive.")
    metadata: str | None = option(None, "File that describes the items: titles, or for sequences their codes.")
    output: str = option(
        "data/prepared", "Folder to write: new, empty, or one that flr prepare wrote, which is replaced."
    )
    user: str | None = option(None, "Column of users; sequences: none, where a line holds items alone.")
    item: str | None = option(None, "Column of items.")
    time: str | None = option(None, "Column of times.")
    title: str | None = option(None, "Column of titles.")
    split: str | None = option(
        None,
        "time (8:1:1) or leave_one_out, which leaks: it trains on events later than other users' test events. "
        "Default: time; sequences have no times: leave_one_out.",
    )
    max_history: int | None = option(None, "Items of a history. Default: 10.")
    min_interactions: int | None = option(
        None, f"k of the k-core filter over users and items, 0 for none. Default: {_CORE}; sequences: 0."
    )
    since: str | None = option(None, "Keep events from this ISO date, or number of seconds since 1970, on.")
    until: str | None = option(None, "Keep events before this ISO date, or number of seconds since 1970.")
    max_bad_share: float | None = option(None, "Share of malformed rows above which to refuse. Default: 0.01.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "max_history": COUNT.or_none,
        "min_interactions": COUNT_FROM_ZERO.or_none,
        "max_bad_share": PROBABILITY.or_none,
    }

    def __post_init__(self) -> None:
        check_numbers(self, self.numbers)


def main(argv: list[str]) -> int:
    kind, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    options, rest = parse("prepare", ABOUT, (PrepareOptions,), argv)
    if kind not in KINDS:
        raise ValueError(f"kind: expected flr prepare {' | '.join(KINDS)}, got {kind!r}")
    if options.source is None:
        raise ValueError("source: expected a file or folder, got none")
    from flr.data import load_dataset
    from flr.data.prepared_folder import check_output
    from flr.data.readers import options_of

    from .options import in_words

    output = check_output(options.output)
    for name in ("source", "metadata"):
        path = getattr(options, name)
        if path is not None and Path(path).resolve().is_relative_to(output):
            raise ValueError(f"{name}: expected a place outside of {options.output}, which is replaced, got {path}")
    given: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("source", "output") and getattr(options, field.name) is not None
    }
    takes = options_of(options.source, kind)
    if "since" in takes:  # events as they happened; sequences and split rows were chosen by whoever wrote them
        given.setdefault("min_interactions", _CORE)
    with _progress() as progress:
        if "progress" in takes:
            given["progress"] = progress
        dataset = load_dataset(options.source, kind, **given)
    dataset.save(options.output)
    voice.note(dataset.report)
    voice.result(f"Wrote {options.output}: {in_words(dataset)}.")
    sizes = {name: len(getattr(dataset, name)) for name in ("catalogue", "train", "valid", "test")}
    emit({"output": options.output, **sizes}, rest.json)
    return 0


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for each file that is read."""
    from rich.progress import DownloadColumn

    with voice.live(DownloadColumn()) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"reading {name}", total=total, facts="")
            bars.update(tasks[name], completed=done)

        yield advance
