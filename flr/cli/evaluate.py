"""``flr evaluate``: rank a split over the whole catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import COUNT, PROBABILITY, Numbers, check_numbers, option

from . import voice
from .options import DataOptions, load_trained
from .parsing import REVISION, emit, parse
from .weights import InferenceOptions

if TYPE_CHECKING:
    from flr.evaluate import EvalResult, Share

ABOUT = "Rank every target of a split over the whole catalogue; popularity and item-kNN stand beside the model."


@dataclass
class EvaluateOptions(InferenceOptions):
    """What to evaluate, and how."""

    model: str = option("runs/sft", "Folder that flr sft wrote, or id of such a model on the Hub.")
    revision: str | None = option(None, REVISION)
    split: str = option("test", "train, valid or test.")
    max_users: int | None = option(None, "Evaluate on that many rows only, evenly spread. Default: all.")
    output: str | None = option(None, "Folder for metrics.json and per-user ranks.parquet.")
    batch_size: int = option(64, "Users at a time; no influence on results.")
    num_beams: int = option(
        20, "Beams, for codecs of several tokens an item; with fewer than k, metrics at k miss items."
    )
    scoring: str = option("auto", "full, catalogue, or auto: what probabilities are normalised over.")
    method: str = option("auto", "auto, beam or exhaustive (every item scored).")
    exclude_seen: bool = option(False, "Never recommend an item of the history.")
    neighbours_weight: float | None = option(
        None,
        "Weight of the table that flr neighbours made in the answer, 0..1. Default: as saved.",
    )
    baselines: bool = option(True, "Show popularity and item-kNN too.")
    linear: bool = option(False, "Show a linear item-item model too, solved in one step: up to 25,000 items.")
    card: bool = option(True, "Write the metrics into the model card, README.md in the model's folder.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "max_users": COUNT.or_none,
        "batch_size": COUNT,
        "num_beams": COUNT,
        "neighbours_weight": PROBABILITY.or_none,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, self.numbers)


def main(argv: list[str]) -> int:
    options, data, rest = parse("evaluate", ABOUT, (EvaluateOptions, DataOptions), argv)
    if options.split not in ("train", "valid", "test"):
        raise ValueError(f"split: expected train, valid or test, got {options.split!r}")
    from flr.evaluate import launched

    with launched() as share:
        results = _results(options, data, share)
    result, *others = results
    voice.result(result.table(*others))
    if any(one.metrics["title"][name] != one.metrics["item"][name] for one in results for name in one.metrics["title"]):
        voice.result(result.table(*others, level="title"))  # items share titles
    emit({r.name: {"metrics": r.metrics, "settings": r.settings} for r in results}, rest.json)
    return 0


def _results(options: EvaluateOptions, data: DataOptions, share: Share) -> list[EvalResult]:
    """The model's result, then those of the baselines, the same in every process; the first one writes files."""
    from flr.data import MOST_LINEAR_ITEMS, HistoryViews
    from flr.data.growth import in_catalogue
    from flr.evaluate import evaluate, evaluate_scorer
    from flr.evaluate.baselines import ItemKNN, LinearItems, Popularity
    from flr.model.folder import local_folder

    from .card import measured, model_facts, update_card
    from .report import for_report

    dataset = data.announce()
    model, processor = load_trained(options.model, None, options.revision, data=data, **options.as_saved())
    dataset = in_catalogue(dataset, processor.catalogue, options.model)
    if options.linear and (size := len(dataset.catalogue)) > MOST_LINEAR_ITEMS:
        raise ValueError(f"linear: expected False with more than {MOST_LINEAR_ITEMS:,} items, got True with {size:,}")
    views = data.views(processor.views)
    if options.neighbours_weight is not None:
        views = replace(views or HistoryViews(weight=0.0), neighbours=options.neighbours_weight)
    rows = getattr(dataset, options.split).spread(options.max_users)
    result = evaluate(
        model,
        processor,
        rows,
        **{name: getattr(options, name) for name in ("batch_size", "num_beams", "scoring", "method", "exclude_seen")},
        output_dir=options.output,
        views=views,
        progress=voice.shows_progress(),
        name=getattr(model.config, "flr", {}).get("variant", "model"),
        share=share,
    )
    if options.output and share.rank == 0:
        for_report(result, dataset, local_folder(options.model, revision=options.revision)).save(options.output)
    if options.card and share.rank == 0:
        given = {"views": views != processor.views, "max_prompt_tokens": data.max_prompt_tokens is not None}
        if changed := [name for name, other in given.items() if other]:
            voice.note(f"The model card stays as it is: these are not figures of the saved {' and '.join(changed)}.")
        else:
            update_card(options.model, model_facts(model, processor, dataset), measured(dataset, options.split, result))
    kinds = [*((Popularity, ItemKNN) if options.baselines else ()), *((LinearItems,) if options.linear else ())]
    scorers = [kind(dataset.train, len(dataset.catalogue)) for kind in kinds]
    shared: dict[str, Any] = {"exclude_seen": options.exclude_seen, "share": share}
    return [result, *(evaluate_scorer(scorer, rows, dataset.catalogue, **shared) for scorer in scorers)]
