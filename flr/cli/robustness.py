"""``flr robustness``: how rankings hold on histories that are damaged, and for cold items and users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import COUNT, COUNT_FROM_ZERO, Numbers, check_numbers, option

from . import voice
from .options import DataOptions, load_trained
from .parsing import emit, parse
from .weights import InferenceOptions
from .written import write_measured

if TYPE_CHECKING:
    from flr.data import RecDataset
    from flr.evaluate.robustness import Ranker

ABOUT = "Rank a split with items dropped, replaced, shuffled, truncated or poisoned; cold items and users apart."
KINDS = ("drop", "replace", "shuffle", "truncate", "poison")


@dataclass
class RobustnessOptions(InferenceOptions):
    """Which models, and which damage."""

    models: str = option(
        "runs/sft", "Folders that flr sft or flr rl wrote, with commas between them; NAME=FOLDER names one."
    )
    split: str = option("test", "valid or test.")
    kinds: str = option(",".join(KINDS), f"Some of {', '.join(KINDS)}.")
    severities: str = option("0.2,0.5,0.8", "Shares of a history that are damaged, 0..1.")
    max_users: int | None = option(None, "Rank that many rows of the split only, evenly spread. Default: all.")
    num_beams: int = option(
        20, "Beams, for codecs of several tokens an item; with fewer than k, metrics at k miss items."
    )
    batch_size: int = option(128, "Users at a time; no influence on results.")
    baselines: bool = option(True, "Rank by item-kNN, too.")
    damage_seed: int = option(0, "Seed of the damage, which is the same for all models.")
    output: str = option("robustness", "Folder for robustness.json and robustness.png.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "max_users": COUNT.or_none,
        "num_beams": COUNT,
        "batch_size": COUNT,
        "damage_seed": COUNT_FROM_ZERO,
    }

    def __post_init__(self) -> None:
        InferenceOptions.__post_init__(self)
        check_numbers(self, self.numbers)
        if self.split not in ("valid", "test"):
            raise ValueError(f"split: expected valid or test, got {self.split!r}")
        if not self.kind_list() or set(self.kind_list()) - set(KINDS):
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {self.kinds!r}")
        self.severity_list()
        self.model_folders()

    def kind_list(self) -> list[str]:
        """The kinds by name."""
        return [kind.strip() for kind in self.kinds.split(",") if kind.strip()]

    def severity_list(self) -> list[float]:
        """The severities as numbers, ascending."""
        try:
            values = sorted({float(text) for text in self.severities.split(",")})
        except ValueError:
            values = []
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError(f"severities: expected numbers above 0 and up to 1, got {self.severities!r}")
        return values

    def model_folders(self) -> dict[str, str]:
        """Folders by name."""
        named = [text.strip().rpartition("=") for text in self.models.split(",") if text.strip()]
        folders = {name or Path(folder).name or folder: folder for name, _, folder in named}
        if not named or len(folders) < len(named):
            raise ValueError(f"models: expected folders of different names, got {self.models!r}")
        return folders


def rankers(options: RobustnessOptions, data: DataOptions, dataset: RecDataset) -> tuple[dict[str, Ranker], int]:
    """What ranks rows, by name, and the longest history that one of them reads."""
    from flr.evaluate import evaluate, evaluate_scorer
    from flr.evaluate.baselines import ItemKNN

    made: dict[str, Ranker] = {}
    longest = 0
    for name, folder in options.model_folders().items():
        model, processor = load_trained(folder, dataset, data=data, **options.as_saved())
        longest = max(longest, processor.max_history)
        shared: dict[str, Any] = {"batch_size": options.batch_size, "num_beams": options.num_beams, "name": name}
        shared |= {"progress": voice.shows_progress(), "samples": 1, "views": data.views(processor.views)}
        made[name] = partial(evaluate, model, processor, **shared)
    if options.baselines:
        knn = ItemKNN(dataset.train, len(dataset.catalogue))
        made[knn.name] = lambda rows: evaluate_scorer(knn, rows, dataset.catalogue, samples=1)
    return made, longest


def print_table(found: list[dict[str, Any]], names: list[str]) -> None:
    """A row a kind and severity, a column a ranker: NDCG@10 and what is left of it."""
    clean = {row["ranker"]: row["ndcg@10"][0] for row in found if row["kind"] == "clean"}
    table = voice.table("NDCG@10, and its share of that on clean histories", "histories", *names)
    for kind, severity in dict.fromkeys((row["kind"], row["severity"]) for row in found):
        cells = []
        for name in names:
            row = next(r for r in found if (r["ranker"], r["kind"], r["severity"]) == (name, kind, severity))
            value = row["ndcg@10"][0]
            share = f" [dim]{value / clean[name]:.0%}[/dim]" if "change" in row and clean[name] > 0 else ""
            cells.append(f"{value:.4f}{share}")
        rows = next(r["rows"] for r in found if (r["kind"], r["severity"]) == (kind, severity))
        label = f"{kind} {severity:g}" if severity else f"{kind}, {rows:,} rows"
        table.add_row(label, *cells)
    voice.result(table)


def main(argv: list[str]) -> int:
    options, data, rest = parse("robustness", ABOUT, (RobustnessOptions, DataOptions), argv)
    import numpy as np

    from flr.evaluate.robustness import robustness

    dataset = data.announce()
    made, longest = rankers(options, data, dataset)
    found = robustness(
        made,
        getattr(dataset, options.split).spread(options.max_users),
        popularity=np.bincount(dataset.train.targets, minlength=len(dataset.catalogue)),
        kinds=options.kind_list(),
        severities=options.severity_list(),
        max_history=longest,
        seed=options.damage_seed,
        note=voice.note,
    )
    print_table(found, list(made))
    outcome = {"split": options.split, "models": options.model_folders(), "measurements": found}

    def draw(path: Path) -> None:
        from flr.report.plots import plot_robustness

        plot_robustness(found, path)

    write_measured(Path(options.output), "robustness", outcome, draw)
    emit(outcome, rest.json)
    return 0
