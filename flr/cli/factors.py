"""``flr factors``: which factors a model needs, for what kind of item, and whether runs agree; the others pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import COUNT, Numbers, check_numbers, option

from . import voice
from .options import DataOptions, load_trained
from .parsing import emit, parse
from .weights import InferenceOptions
from .written import new_folder, write_measured, writing_model

if TYPE_CHECKING:
    from flr.data import Catalogue
    from flr.explain import FactorsNeeded

ABOUT = (
    "What a model loses without each of its factors, by kind of item, and how many are enough; --prune writes the "
    "model with those alone. Of several runs: whether their factors divide histories alike."
)
_MOST_KINDS = 8  # in the table


@dataclass
class FactorsOptions(InferenceOptions):
    """Which models, and what to measure."""

    models: str = option(
        "runs/sft", "Folders that flr sft or flr rl wrote, with commas between them; the first is measured."
    )
    split: str = option("valid", "train, valid or test: whose rows are measured on.")
    max_users: int | None = option(1000, "Measure on that many of the rows, evenly spread; None for all.")
    kinds: str | None = option(
        None,
        "An attribute of the catalogue, or sid (an item's first code), to tell items apart by. Default: sid, if any.",
    )
    batch_size: int = option(16, "Rows at a time; no influence on results.")
    keep: int | None = option(None, "With --prune: how many factors. Default: as many as are enough.")
    prune: str | None = option(None, "Folder to write the pruned model to, new or empty.")
    output: str | None = option(None, "Folder for factors_needed.json and its picture. Default: the first model's.")

    numbers: ClassVar[Mapping[str, Numbers]] = {"max_users": COUNT.or_none, "batch_size": COUNT, "keep": COUNT.or_none}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, self.numbers)
        if self.split not in ("train", "valid", "test"):
            raise ValueError(f"split: expected train, valid or test, got {self.split!r}")
        if self.keep is not None and self.prune is None:
            raise ValueError(f"keep: expected --prune FOLDER beside it, got {self.keep} alone")
        if not self.folders():
            raise ValueError(f"models: expected at least one folder, got {self.models!r}")

    def folders(self) -> list[str]:
        """The models' folders."""
        return [text.strip() for text in self.models.split(",") if text.strip()]


def item_kinds(catalogue: Catalogue, name: str | None) -> Sequence[str] | None:
    """A kind of every item, or None.

    Raises:
        ValueError: no such attribute, no semantic IDs.
    """
    if name is None or name == "sid":
        if catalogue.sids is None:
            if name is None:
                return None
            raise ValueError("kinds: expected an attribute of the catalogue, got sid, which its items do not have")
        return [codes[0] for codes in catalogue.sids]
    if name not in catalogue.attributes:
        known = ", ".join(["sid", *catalogue.attributes])
        raise ValueError(f"kinds: expected one of {known}, got {name!r}")
    return [str(value) for value in catalogue.attributes[name].tolist()]


def print_tables(found: FactorsNeeded, kept: list[int]) -> None:
    """What each factor is worth, and how few are enough."""
    shown = sorted(sorted(range(len(found.kinds)), key=lambda n: -found.rows[n])[:_MOST_KINDS])
    heads = [] if len(found.kinds) == 1 else [found.kinds[n] for n in shown]
    title = f"Loss more without a factor, nats a user (with all: {found.loss:.3f})"
    table = voice.table(title, "factor", "gate", "without it", *heads)
    for k, (change, gate) in enumerate(zip(found.without, found.gates, strict=True)):
        cells = [f"{found.by_kind[k][n]:+.3f}" for n in shown] if heads else []
        mark = "" if k in kept else " [dim](not needed)[/dim]"
        interval = f"{change.mean:+.4f} [dim]{change.low:+.4f} to {change.high:+.4f}[/dim]"
        table.add_row(f"{k + 1}{mark}", f"{gate:.1%}", interval, *cells)
    voice.result(table)
    path = voice.table("The fewest that are enough", "factors", "kept", "loss more")
    for left, change in found.path:
        mark = "  enough" if len(left) == found.enough else ""
        numbers = " ".join(str(k + 1) for k in left)
        path.add_row(
            str(len(left)), numbers, f"{change.mean:+.4f} [dim]{change.low:+.4f} to {change.high:+.4f}[/dim]{mark}"
        )
    voice.result(path)
    voice.note(
        f"Enough: within one standard error of the loss with all, {found.error:.4f} nats; nothing is trained again."
    )


def write_pruned(output: Path, model: Any, processor: Any, keep: list[int]) -> None:
    """The model with some factors alone, as a folder that appears whole or not at all."""
    from flr.model.pruning import prune_factors

    prune_factors(model, keep)
    with writing_model(output, model, processor):
        pass
    voice.result(f"Wrote {output}: {len(keep)} factors. Training goes on from it by flr sft --model {output}.")


def print_stability(names: list[str], table: list[list[float]]) -> None:
    """How alike the runs' factors divide histories."""
    shown = voice.table("How alike factors divide the histories' items (NMI; 1 is alike)", "run", *names)
    for name, row in zip(names, table, strict=True):
        shown.add_row(*voice.plain(name, *(f"{value:.2f}" for value in row)))
    voice.result(shown)


def main(argv: list[str]) -> int:
    options, data, rest = parse("factors", ABOUT, (FactorsOptions, DataOptions), argv)
    from flr.explain import factor_stability, factors_needed

    if data.views() is not None:
        raise ValueError(f"views_weight: expected none, since losses are of whole histories, got {data.views_weight:g}")
    place = None if options.prune is None else new_folder("prune", options.prune)
    dataset = data.announce()
    loaded = [load_trained(folder, dataset, data=data, **options.as_saved()) for folder in options.folders()]
    model, processor = loaded[0]
    rows = getattr(dataset, options.split).spread(options.max_users)
    kinds = item_kinds(dataset.catalogue, options.kinds)
    found = factors_needed(model, processor, rows, kinds, options.batch_size, voice.note)
    kept = found.kept(options.keep)
    print_tables(found, kept)
    outcome = {"model": options.folders()[0], "split": options.split, "users": len(rows), **found.to_dict()}
    if len(loaded) > 1:
        outcome["stability"] = factor_stability(loaded, rows)
        print_stability([Path(folder).name for folder in options.folders()], outcome["stability"])

    def draw(path: Path) -> None:
        from flr.report.factors import plot_needed

        plot_needed(outcome, path)

    write_measured(Path(options.output or options.folders()[0]), "factors_needed", outcome, draw)
    if place is not None:
        write_pruned(place, model, processor, kept)
        outcome["pruned"] = {"folder": options.prune, "kept": kept}
    emit(outcome, rest.json)
    return 0
