"""What ``flr neighbours`` and ``flr views`` share: weights to try on valid, and a table of what each gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import COUNT, Numbers, check_numbers, option

from . import voice
from .options import DataOptions, load_trained
from .weights import InferenceOptions

if TYPE_CHECKING:
    from flr.data import HistoryViews, NeighbourTable, RecDataset, RecProcessor
    from flr.evaluate import NeighbourFit


@dataclass
class MixingOptions(InferenceOptions):
    """Which model, and which weights to try."""

    model: str = option("runs/sft", "Folder that flr sft or flr rl wrote; what is chosen is written into it.")
    weights: str = option("0,0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "Weights to try, 0..1.")
    max_users: int | None = option(None, "Choose by that many rows of valid, evenly spread. Default: all.")
    num_beams: int = option(20, "Beams, for codecs of several tokens an item.")
    batch_size: int = option(128, "Users at a time; no influence on results.")
    dry_run: bool = option(False, "Show what each weight gives, and write nothing.")

    numbers: ClassVar[Mapping[str, Numbers]] = {"max_users": COUNT.or_none, "num_beams": COUNT, "batch_size": COUNT}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, self.numbers)

    def checked(self) -> list[float]:
        """The weights as numbers; ValueError where they or the folder are unusable."""
        try:
            weights = [float(text) for text in self.weights.split(",")]
        except ValueError:
            weights = []
        if not weights or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights: expected numbers in 0..1 with commas between them, got {self.weights!r}")
        if not Path(self.model).is_dir():
            raise ValueError(f"model: expected a folder that can be written to, got {self.model!r}")
        return weights

    def loaded(self, data: DataOptions, dataset: RecDataset) -> tuple[Any, RecProcessor]:
        """The model and its processor, as they were saved."""
        return load_trained(self.model, dataset, data=data, **self.as_saved())

    def save(self, before: HistoryViews | None, views: HistoryViews, table: NeighbourTable | None = None) -> None:
        """Let the model answer with these from now on; metrics of what it answered ``before`` leave its card."""
        from flr.data.processor_folder import save_views

        from .card import drop_measured

        save_views(self.model, views, table)
        if table is not None or views != before:
            drop_measured(self.model)

    def sizes(self) -> dict[str, Any]:
        """How rows are ranked."""
        return {"num_beams": self.num_beams, "batch_size": self.batch_size, "progress": voice.shows_progress()}


def shown(what: str, fit: NeighbourFit, rows: int, chosen: bool = True) -> dict[str, list[float]]:
    """Print what each weight of ``what`` gave, and return the means by weight."""
    means = {name: values.mean(1).tolist() for name, values in fit.metrics.items()}
    table = voice.table(f"{rows} rows of valid, by weight of {what}", "weight", "HR@10", "NDCG@10")
    for weight, hr, ndcg in zip(fit.weights, means["hr@10"], means["ndcg@10"], strict=True):
        mark = "  best" if chosen and weight == fit.best else ""
        table.add_row(f"{weight:g}", f"{hr:.4f}", f"{ndcg:.4f}{mark}")
    voice.result(table)
    return means
