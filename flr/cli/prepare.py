"""``flr prepare``: raw logs into a folder that every other command reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flr.config import option

from .parsing import console, emit, parse

ABOUT = "Turn raw logs into a prepared folder: flr prepare amazon | recbole | parquet | csv --source … --output …"
KINDS = ("amazon", "recbole", "parquet", "csv")


@dataclass
class PrepareOptions:
    """What to read and how to split it."""

    source: str | None = option(None, "amazon: reviews .json(l)(.gz); else a file or folder.")
    metadata: str | None = option(None, "amazon: metadata file with the titles.")
    output: str = option("data/prepared", "Folder to write.")
    split: str = option(
        "time", "time (8:1:1) or leave_one_out, which leaks: it trains on events later than other users' test events."
    )
    max_history: int = option(10, "Items of a history.")
    min_interactions: int = option(5, "k of the k-core filter over users and items.")
    since: str | None = option(None, "amazon: keep reviews from this ISO date on.")
    until: str | None = option(None, "amazon: keep reviews before this ISO date.")
    max_bad_share: float = option(0.01, "Share of malformed rows above which to refuse.")


def main(argv: list[str]) -> int:
    kind, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    options, rest = parse("prepare", ABOUT, (PrepareOptions,), argv)
    if kind not in KINDS:
        raise ValueError(f"kind: expected flr prepare {' | '.join(KINDS)}, got {kind!r}")
    if options.source is None:
        raise ValueError("source: expected a file or folder, got none")
    from flr.data import load_dataset, prepare_amazon

    splitting = () if kind == "csv" else ("split", "max_history", "min_interactions")
    given: dict[str, Any] = {name: getattr(options, name) for name in ("max_bad_share", *splitting)}
    with console.status(f"reading {options.source}"):
        if kind == "amazon":
            given |= {"since": options.since, "until": options.until}
            dataset = prepare_amazon(options.source, options.metadata, **given)
        else:
            dataset = load_dataset(options.source, kind, **given)
    dataset.save(options.output)
    console.print(dataset.report)
    console.print(f"{dataset!r} written to {options.output}")
    sizes = {name: len(getattr(dataset, name)) for name in ("catalogue", "train", "valid", "test")}
    emit({"output": options.output, **sizes}, rest.json)
    return 0
