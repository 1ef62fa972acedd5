"""``flr neighbours``: item-kNN or a linear model beside a trained one, with the weight that valid asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flr.config import option

from . import voice
from .options import DataOptions, announce_linear, load_trained
from .parsing import emit, parse
from .weights import InferenceOptions

if TYPE_CHECKING:
    from flr.data import NeighbourTable, RecDataset
    from flr.evaluate import NeighbourFit

ABOUT = "Mix item-kNN or a linear model into a trained one's answers, with the weight that ranks the valid split best."
METHODS = ("item-knn", "linear")


@dataclass
class NeighbourOptions(InferenceOptions):
    """Which model, and which weights to try."""

    model: str = option(
        "runs/sft", "Folder that flr sft or flr rl wrote; the table and its weight are written into it."
    )
    method: str = option(
        "auto",
        "item-knn; linear, a ridge regression of targets on histories, of at most 25,000 items; or auto, whichever "
        "ranks valid better.",
    )
    weights: str = option("0,0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "Weights of the table to try, 0..1.")
    max_users: int | None = option(None, "Choose by that many rows of valid, evenly spread. Default: all.")
    num_beams: int = option(20, "Beams, for codecs of several tokens an item.")
    batch_size: int = option(128, "Users at a time; no influence on results.")
    history_decay: float | None = option(
        None, "Weight of an item relative to the next later one, in (0, 1]. Default: 0.6 for item-kNN, 0.8 for linear."
    )
    backward: float = option(0.5, "Weight of what came before an item against what followed it.")
    top: int | None = option(None, "Neighbours kept an item. Default: 500 for item-kNN, 100 for linear.")
    dry_run: bool = option(False, "Show what each weight gives, and write nothing.")

    def weight_list(self) -> list[float]:
        """The weights as numbers."""
        try:
            weights = [float(text) for text in self.weights.split(",")]
        except ValueError:
            weights = []
        if not weights or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights: expected numbers in 0..1 with commas between them, got {self.weights!r}")
        return weights

    def tables(self, dataset: RecDataset) -> dict[str, NeighbourTable]:
        """The tables to try, by method."""
        from flr.data import MOST_LINEAR_ITEMS, NeighbourTable, fit_linear
        from flr.data.item_knn import KEPT_NEIGHBOURS

        size, methods = len(dataset.catalogue), METHODS if self.method == "auto" else (self.method,)
        if self.method == "auto" and size > MOST_LINEAR_ITEMS:
            bound = f"a linear model takes at most {MOST_LINEAR_ITEMS:,} items"
            voice.note(f"Item-kNN alone is tried: {bound}, and these are {size:,}.")
            methods = METHODS[:1]
        if "linear" in methods:
            announce_linear(size)
        given: dict[str, Any] = {"history_decay": self.history_decay, "backward": self.backward, "top": self.top}
        given = {name: value for name, value in given.items() if value is not None}
        fits: dict[str, Callable[[], NeighbourTable]] = {
            "item-knn": lambda: NeighbourTable.fit(dataset.train, size, **{"top": KEPT_NEIGHBOURS, **given}),
            "linear": lambda: fit_linear(dataset.train, size, **given),
        }
        return {method: fits[method]() for method in methods}


def main(argv: list[str]) -> int:
    options, data, rest = parse("neighbours", ABOUT, (NeighbourOptions, DataOptions), argv)
    weights = options.weight_list()
    if options.method not in ("auto", *METHODS):
        raise ValueError(f"method: expected auto or one of {', '.join(METHODS)}, got {options.method!r}")
    for name in ("max_users", "num_beams", "batch_size", "top"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not Path(options.model).is_dir():
        raise ValueError(f"model: expected a folder that can be written to, got {options.model!r}")
    from flr.data import HistoryViews
    from flr.data.processor_folder import save_views
    from flr.evaluate.neighbours import fit_tables

    dataset = data.announce()
    model, processor = load_trained(
        options.model, dataset, max_prompt_tokens=data.max_prompt_tokens, **options.as_saved()
    )
    processor.views = data.views(processor.views)
    tables = options.tables(dataset)
    rows = dataset.valid.spread(options.max_users)
    sizes: dict[str, int] = {"num_beams": options.num_beams, "batch_size": options.batch_size}
    fits = fit_tables(model, processor, tables, rows, weights, progress=voice.shows_progress(), **sizes)
    chosen = max(fits, key=lambda method: fits[method].metrics["ndcg@10"].mean(1).max())
    means = {method: _shown(method, fit, len(rows), method == chosen) for method, fit in fits.items()}
    best = fits[chosen].best
    if not options.dry_run:
        views = replace(processor.views or HistoryViews(weight=0.0), neighbours=best)
        save_views(options.model, views, tables[chosen])
        voice.note(f"{options.model} answers with {chosen} at weight {best:g} from now on.")
    found = {"weights": list(fits[chosen].weights), "best": best, "rows": len(rows), "metrics": means[chosen]}
    tried = {method: {"best": fit.best, "metrics": means[method]} for method, fit in fits.items()}
    emit({**found, "method": chosen, "methods": tried}, rest.json)
    return 0


def _shown(method: str, fit: NeighbourFit, rows: int, chosen: bool) -> dict[str, list[float]]:
    """Print a method's table, and return the means by weight."""
    means = {name: values.mean(1).tolist() for name, values in fit.metrics.items()}
    shown = voice.table(f"{rows} rows of valid, by weight of {method}", "weight", "HR@10", "NDCG@10")
    for weight, hr, ndcg in zip(fit.weights, means["hr@10"], means["ndcg@10"], strict=True):
        mark = "  best" if chosen and weight == fit.best else ""
        shown.add_row(f"{weight:g}", f"{hr:.4f}", f"{ndcg:.4f}{mark}")
    voice.result(shown)
    return means
