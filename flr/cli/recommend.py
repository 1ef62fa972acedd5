"""``flr recommend``: top-k items for histories."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flr.config import MAX_BEAMS, MAX_K, Numbers, check_numbers, option

from . import voice
from .parsing import REVISION, emit, parse
from .weights import InferenceOptions

ABOUT = "Recommend the next items for a history of item ids or titles, with each factor's share."


@dataclass
class RecommendOptions(InferenceOptions):
    """For whom, and how many."""

    model: str = option("runs/sft", "Folder that flr sft wrote, or id of such a model on the Hub.")
    revision: str | None = option(None, REVISION)
    history: list[str] = option([], "Item ids or titles, oldest first. None: one history a line on stdin.")
    k: int = option(10, "Items to recommend.")
    num_beams: int = option(20, "Beams, for codecs of several tokens an item.")
    exclude_seen: bool = option(False, "Never recommend an item of the history.")
    on_unknown: str = option("raise", "raise or skip items that the catalogue lacks.")
    shares: bool | None = option(None, "Compute each factor's share. None: for --history, not for histories on stdin.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "k": Numbers(1, MAX_K, whole=True),
        "num_beams": Numbers(1, MAX_BEAMS, whole=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, self.numbers)


def main(argv: list[str]) -> int:
    options, rest = parse("recommend", ABOUT, (RecommendOptions,), argv)
    from flr.recommend import Recommender

    recommender = Recommender.from_pretrained(options.model, revision=options.revision, **options.as_saved())
    histories = [options.history]
    if not options.history:
        histories = [line.rstrip("\n").split("\t") for line in sys.stdin if line.strip()]
    recommended = recommender.recommend(
        histories,
        k=options.k,
        num_beams=options.num_beams,
        exclude_seen=options.exclude_seen,
        on_unknown=options.on_unknown,
        shares=bool(options.history) if options.shares is None else options.shares,
    )
    for history, items in zip(histories, recommended, strict=True):
        heads = (
            "item",
            "title",
            "log-probability",
            *(("factor shares",) if any(r.factor_shares for r in items) else ()),
        )
        table = voice.table(f"After {' → '.join(history[-3:]) or 'an empty history'}", *heads, text=2)
        for item in items:
            shares = " ".join(f"{share:4.0%}" for share in item.factor_shares)
            table.add_row(*voice.plain(item.item_id, item.title, f"{item.score:.3f}", shares)[: len(heads)])
        voice.result(table)
    emit({"recommendations": [[item.to_dict() for item in items] for items in recommended]}, rest.json)
    return 0
