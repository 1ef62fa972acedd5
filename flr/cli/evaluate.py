"""``flr evaluate``: rank a split over the whole catalogue."""

from __future__ import annotations

from dataclasses import dataclass, field

from flr.data import RecProcessor
from flr.evaluate import evaluate, evaluate_scorer
from flr.evaluate.baselines import ItemKNN, Popularity

from .options import DataOptions
from .parsing import console, emit, parse

ABOUT = "Rank every target of a split over the whole catalogue; popularity and item-kNN stand beside the model."


@dataclass
class EvaluateOptions:
    """What to evaluate, and how."""

    model: str = field(default="runs/sft", metadata={"help": "Folder that flr sft wrote."})
    split: str = field(default="test", metadata={"help": "train, valid or test."})
    output: str | None = field(default=None, metadata={"help": "Folder for metrics.json and per-user ranks.parquet."})
    batch_size: int = field(default=64, metadata={"help": "Users at a time; no influence on results."})
    num_beams: int = field(default=20, metadata={"help": "Beams, for codecs of several tokens an item."})
    scoring: str = field(
        default="auto", metadata={"help": "full, catalogue, or auto: what probabilities are normalised over."}
    )
    method: str = field(default="auto", metadata={"help": "auto, beam or exhaustive (every item scored)."})
    exclude_seen: bool = field(default=False, metadata={"help": "Never recommend an item of the history."})
    baselines: bool = field(default=True, metadata={"help": "Show popularity and item-kNN too."})


def main(argv: list[str]) -> int:
    options, data, rest = parse("evaluate", ABOUT, (EvaluateOptions, DataOptions), argv)
    from flr.model.checkpoint import from_pretrained

    if options.split not in ("train", "valid", "test"):
        raise ValueError(f"split: expected train, valid or test, got {options.split!r}")
    dataset = data.load()
    model, processor = from_pretrained(options.model), RecProcessor.from_pretrained(options.model)
    if processor.catalogue.item_ids != dataset.catalogue.item_ids:
        raise ValueError(f"data: expected the catalogue that {options.model} was trained on, got another one")
    rows = getattr(dataset, options.split)
    result = evaluate(
        model,
        processor,
        rows,
        batch_size=options.batch_size,
        num_beams=options.num_beams,
        scoring=options.scoring,
        method=options.method,
        exclude_seen=options.exclude_seen,
        output_dir=options.output,
        views=data.views(),
        name=getattr(model.config, "flr", {}).get("variant", "model"),
    )
    scorers = (
        [kind(dataset.train, len(dataset.catalogue)) for kind in (Popularity, ItemKNN)] if options.baselines else []
    )
    others = [evaluate_scorer(s, rows, dataset.catalogue, exclude_seen=options.exclude_seen) for s in scorers]
    for level in ("item", "title"):
        console.print(result.table(*others, level=level))
    emit({r.name: {"metrics": r.metrics, "settings": r.settings} for r in (result, *others)}, rest.json)
    return 0
