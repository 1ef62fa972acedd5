"""``flr neighbours``: item-kNN or a linear model beside a trained one, with the weight that valid asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import COUNT, NOT_NEGATIVE, Numbers, option

from . import voice
from .mixing import MixingOptions, shown
from .options import DataOptions, announce_linear
from .parsing import emit, parse

if TYPE_CHECKING:
    from flr.data import NeighbourTable, RecDataset

ABOUT = "Mix item-kNN or a linear model into a trained one's answers, with the weight that ranks the valid split best."
METHODS = ("item-knn", "linear")


@dataclass
class NeighbourOptions(MixingOptions):
    """Which model and table, and which weights of the table to try."""

    method: str = option(
        "auto",
        "item-knn; linear, a ridge regression of targets on histories, of at most 25,000 items; or auto, whichever "
        "ranks valid better.",
    )
    history_decay: float | None = option(
        None, "Weight of an item relative to the next later one, in (0, 1]. Default: 0.6 for item-kNN, 0.8 for linear."
    )
    backward: float = option(0.5, "Weight of what came before an item against what followed it.")
    top: int | None = option(None, "Neighbours kept an item. Default: 500 for item-kNN, 100 for linear.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        **MixingOptions.numbers,
        "history_decay": Numbers(0, 1, "(]").or_none,
        "backward": NOT_NEGATIVE,
        "top": COUNT.or_none,
    }

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
    weights = options.checked()
    if options.method not in ("auto", *METHODS):
        raise ValueError(f"method: expected auto or one of {', '.join(METHODS)}, got {options.method!r}")
    from flr.data import HistoryViews
    from flr.evaluate.neighbours import fit_tables

    dataset = data.announce()
    model, processor = options.loaded(data, dataset)
    processor.views = data.views(processor.views)
    tables = options.tables(dataset)
    rows = dataset.valid.spread(options.max_users)
    fits = fit_tables(model, processor, tables, rows, weights, **options.sizes())
    chosen = max(fits, key=lambda method: fits[method].metrics["ndcg@10"].mean(1).max())
    means = {method: shown(method, fit, len(rows), method == chosen) for method, fit in fits.items()}
    best = fits[chosen].best
    if not options.dry_run:
        views = replace(processor.views or HistoryViews(weight=0.0), neighbours=best)
        options.save(processor.views, views, tables[chosen])
        voice.note(f"{options.model} answers with {chosen} at weight {best:g} from now on.")
    found = {"weights": list(fits[chosen].weights), "best": best, "rows": len(rows), "metrics": means[chosen]}
    tried = {method: {"best": fit.best, "metrics": means[method]} for method, fit in fits.items()}
    emit({**found, "method": chosen, "methods": tried}, rest.json)
    return 0
