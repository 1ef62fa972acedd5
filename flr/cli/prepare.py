"""``flr prepare``: raw logs into a folder that every other command reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from flr.data import RecDataset, load_dataset, prepare_amazon

from .parsing import console, emit, parse

ABOUT = "Turn raw logs into a prepared folder: flr prepare amazon | recbole | parquet | csv --source … --output …"
KINDS = ("amazon", "recbole", "parquet", "csv")


@dataclass
class PrepareOptions:
    """What to read and how to split it."""

    source: str | None = field(default=None, metadata={"help": "amazon: reviews .json(l)(.gz); else a file or folder."})
    metadata: str | None = field(default=None, metadata={"help": "amazon: metadata file with the titles."})
    output: str = field(default="data/prepared", metadata={"help": "Folder to write."})
    split: str = field(
        default="time",
        metadata={
            "help": "time (8:1:1) or leave_one_out. Leave-one-out leaks: training data holds events that are later than "
            "other users' test events."
        },
    )
    max_history: int = field(default=10, metadata={"help": "Items of a history."})
    min_interactions: int = field(default=5, metadata={"help": "k of the k-core filter over users and items."})
    since: str | None = field(default=None, metadata={"help": "amazon: keep reviews from this ISO date on."})
    until: str | None = field(default=None, metadata={"help": "amazon: keep reviews before this ISO date."})
    max_bad_share: float = field(default=0.01, metadata={"help": "Share of malformed rows above which to refuse."})


def main(argv: list[str]) -> int:
    kind, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    options, rest = parse("prepare", ABOUT, (PrepareOptions,), argv)
    if kind not in KINDS:
        raise ValueError(f"expected flr prepare {' | '.join(KINDS)}, got {kind!r}")
    if options.source is None:
        raise ValueError("source: expected a file or folder, got none")
    dataset: RecDataset
    if kind == "amazon":
        with console.status(f"reading {options.source}"):
            dataset = prepare_amazon(
                options.source,
                options.metadata,
                output=options.output,
                split=options.split,
                max_history=options.max_history,
                min_interactions=options.min_interactions,
                since=options.since,
                until=options.until,
                max_bad_share=options.max_bad_share,
            )
    else:
        splitting = {
            "split": options.split,
            "max_history": options.max_history,
            "min_interactions": options.min_interactions,
        }
        extra = {} if kind == "csv" else splitting
        with console.status(f"reading {options.source}"):
            dataset = load_dataset(options.source, kind, max_bad_share=options.max_bad_share, **extra)
        dataset.save(options.output)
    console.print(dataset.report)
    console.print(f"{dataset!r} written to {options.output}")
    sizes = {name: len(getattr(dataset, name)) for name in ("catalogue", "train", "valid", "test")}
    emit({"output": options.output, **sizes}, rest.json)
    return 0
