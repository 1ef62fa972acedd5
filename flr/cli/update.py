"""``flr update``: a trained model learns what has come since, and is kept only where it is not worse."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import SHARE, Numbers, check_numbers, given, option

from . import voice
from .options import AugmentOptions, check_option, in_words
from .parsing import REVISION, emit, parse
from .weights import WeightOptions

if TYPE_CHECKING:
    from flr.data import RecDataset
    from flr.train import UpdateConfig
    from flr.train.updates import Outcome

ABOUT = (
    "Teach a trained model the rows and items that have come since: a bounded training on new rows and some old ones. "
    "The newest rows are ranked before and after, and the model is replaced unless it got worse. See docs/training.md."
)
NOT_KEPT = 3  # exit status


@dataclass
class UpdateOptions(WeightOptions):
    """Which model, and what has come since."""

    model: str = option(
        "runs/sft", "Folder that flr sft, flr rl or flr update wrote, or id of such a model on the Hub."
    )
    revision: str | None = option(None, REVISION)
    data: str | None = option(
        None, "Prepared folder: its train rows are new, its valid rows newer still, and decide; items may be new."
    )
    data_format: str = option("auto", "auto, prepared, or a kind of flr prepare: csv, recbole, parquet, movielens, …")
    since: str | None = option(
        None, "ISO date, or seconds since 1970: train rows of --data before it are old, and are replayed."
    )
    replay: str | None = option(None, "Prepared folder whose train rows are old: some are learned beside the new ones.")
    replay_share: float = option(0.5, "Share of old rows among those that are learned, where there are so many.")
    card: bool = option(
        True, "Write the metrics into the model card, README.md in the model's folder; those of before go either way."
    )

    numbers: ClassVar[Mapping[str, Numbers]] = {"replay_share": SHARE}

    def __post_init__(self) -> None:
        WeightOptions.__post_init__(self)
        check_numbers(self, self.numbers)
        check_option(self, "a prepared folder", bool(self.data), "data")

    def loading(self, use_cpu: bool) -> Any:
        """What the loader is given, by whether the model is an adapter."""
        return lambda adapted: self.to_train(not adapted, use_cpu)


def main(argv: list[str]) -> int:
    from flr.train import UpdateConfig

    options, augment, args, rest = parse("update", ABOUT, (UpdateOptions, AugmentOptions, UpdateConfig), argv)
    outcome = update(options, augment, args)
    if outcome.repeated:
        voice.note(f"{args.output_dir or options.model} has learned these rows before; nothing to do.")
    _show(outcome)
    output = str(Path(args.output_dir or options.model)) if outcome.kept else None
    emit({"output_dir": output, "kept": outcome.kept, "why": outcome.why, **outcome.facts}, rest.json)
    return 0 if outcome.kept else NOT_KEPT


def update(options: UpdateOptions, augment: AugmentOptions, args: UpdateConfig) -> Outcome:
    """Load data, update, write the card."""
    from flr.data import load_dataset
    from flr.data.times import seconds_of
    from flr.train.updates import update as run

    from .card import drop_measured

    if augment.held_back:
        raise ValueError(f"held_back: expected 0 for an update, whose newest rows are valid's, got {augment.held_back}")
    since = None if options.since is None else seconds_of("since", options.since)
    dataset = load_dataset(str(options.data), options.data_format)
    voice.note(f"Data {dataset.name!r}: {in_words(dataset)}.")
    outcome = run(
        options.model,
        dataset,
        args,
        replay=None if options.replay is None else load_dataset(options.replay, options.data_format),
        share=options.replay_share,
        since=since,
        revision=options.revision,
        loading=options.loading(args.use_cpu),
        vary=augment.apply,
        watching=_watched,
        say=voice.note,
        more={**given(augment), **given(options, "dtype")},
    )
    if outcome.kept and not outcome.repeated:
        place = str(args.output_dir or options.model)
        if options.card:
            _write_card(place, dataset, outcome, (options, augment, args))
        else:
            drop_measured(place)
    return outcome


@contextlib.contextmanager
def _watched(trainer: Any) -> Iterator[None]:
    from .watch import watched

    with contextlib.redirect_stdout(sys.stderr), watched(trainer):  # standard output is for results
        yield


def _show(outcome: Outcome) -> None:
    facts = outcome.facts
    rows = f"{facts['new_rows']:,} new rows, {facts['replay_rows']:,} old ones, {facts['new_items']:,} new items"
    table = voice.table(f"{rows}; {facts['steps']:,} steps. NDCG@10 of the newest rows", "targets", "rows", "before",
                        "after", "difference")  # fmt: skip
    for name, values in facts["ndcg@10"].items():
        mean, low, high, _ = values["difference"]
        means = (f"{values['before']:.4f}", f"{values['after']:.4f}")
        table.add_row(name, f"{values['rows']:,}", *means, f"{mean:+.4f} ({low:+.4f} to {high:+.4f})")
    voice.result(table)
    voice.result(f"{outcome.why[:1].upper()}{outcome.why[1:]}.")
    if (rl := facts.get("rl")) is not None:
        voice.result(f"Reinforcement, {rl['steps']:,} steps on {rl['rows']:,} rows: {rl['why']}.")


def _write_card(folder: str, dataset: RecDataset, outcome: Outcome, options: tuple[Any, ...]) -> None:
    from flr.data import RecProcessor
    from flr.model.checkpoint import load_from

    from .card import measured, model_facts, update_card

    model, place = load_from(folder)
    facts = model_facts(model, RecProcessor.from_pretrained(place), dataset, "flr update", options)
    update_card(folder, facts, measured(dataset, "valid", outcome.after), trained=True)
