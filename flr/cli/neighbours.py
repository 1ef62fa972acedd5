"""``flr neighbours``: item-kNN beside a trained model, with the weight that valid asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from flr.config import option

from . import voice
from .options import DataOptions, load_trained
from .parsing import emit, parse
from .weights import InferenceOptions

ABOUT = "Mix item-kNN into a trained model's answers, with the weight that ranks the valid split best."


@dataclass
class NeighbourOptions(InferenceOptions):
    """Which model, and which weights to try."""

    model: str = option(
        "runs/sft", "Folder that flr sft or flr rl wrote; the table and its weight are written into it."
    )
    weights: str = option("0,0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "Weights of item-kNN to try, 0..1.")
    max_users: int | None = option(None, "Choose by that many rows of valid, evenly spread. Default: all.")
    num_beams: int = option(20, "Beams, for codecs of several tokens an item.")
    batch_size: int = option(128, "Users at a time; no influence on results.")
    history_decay: float = option(0.6, "Item-kNN: weight of an item relative to the next later one, in (0, 1].")
    backward: float = option(0.5, "Item-kNN: weight of co-occurrence against the order.")
    top: int = option(500, "Item-kNN: neighbours kept an item.")
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


def main(argv: list[str]) -> int:
    options, data, rest = parse("neighbours", ABOUT, (NeighbourOptions, DataOptions), argv)
    weights = options.weight_list()
    for name in ("max_users", "num_beams", "batch_size", "top"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not Path(options.model).is_dir():
        raise ValueError(f"model: expected a folder that can be written to, got {options.model!r}")
    from flr.data import HistoryViews, NeighbourTable
    from flr.data.processor_folder import save_views
    from flr.evaluate.neighbours import fit_neighbours

    dataset = data.announce()
    model, processor = load_trained(
        options.model, dataset, max_prompt_tokens=data.max_prompt_tokens, **options.as_saved()
    )
    processor.views = data.views(processor.views)
    counted = options.history_decay, options.backward, options.top
    table = NeighbourTable.fit(dataset.train, len(dataset.catalogue), *counted)
    rows = dataset.valid.spread(options.max_users)
    sizes: dict[str, int] = {"num_beams": options.num_beams, "batch_size": options.batch_size}
    fit = fit_neighbours(model, processor, table, rows, weights, progress=voice.shows_progress(), **sizes)
    shown = voice.table(f"{len(rows)} rows of valid, by weight of item-kNN", "weight", "HR@10", "NDCG@10")
    means = {name: values.mean(1).tolist() for name, values in fit.metrics.items()}
    for weight, hr, ndcg in zip(fit.weights, means["hr@10"], means["ndcg@10"], strict=True):
        mark = "  best" if weight == fit.best else ""
        shown.add_row(f"{weight:g}", f"{hr:.4f}", f"{ndcg:.4f}{mark}")
    voice.result(shown)
    if not options.dry_run:
        views = replace(processor.views or HistoryViews(weight=0.0), neighbours=fit.best)
        save_views(options.model, views, table)
        voice.note(f"{options.model} answers with item-kNN at weight {fit.best:g} from now on.")
    emit({"weights": list(fit.weights), "best": fit.best, "rows": len(rows), "metrics": means}, rest.json)
    return 0
