"""``flr explain``: what each factor looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flr.config import MAX_K, Numbers, check_numbers, option

from . import voice
from .parsing import REVISION, emit, parse
from .weights import InferenceOptions

if TYPE_CHECKING:
    from flr.recommend import Explanation

ABOUT = "Show which history items each factor attends to and what it contributed: heat map (PNG) and HTML page."


@dataclass
class ExplainOptions(InferenceOptions):
    """For which history, and where to."""

    model: str = option("runs/sft", "Folder that flr sft wrote, or id of such a model on the Hub.")
    revision: str | None = option(None, REVISION)
    history: list[str] = option([], "Item ids or titles, oldest first.")
    k: int = option(5, "Recommendations that are explained.")
    png: str | None = option(None, "Heat map to write.")
    html: str | None = option(None, "Self-contained page to write.")

    numbers: ClassVar[Mapping[str, Numbers]] = {"k": Numbers(1, MAX_K, whole=True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, self.numbers)


def say_effects(explanation: Explanation) -> None:
    """The figures of the page, as a table: nats, and what they mean."""
    figures = explanation.effects()
    if figures is None:  # nothing is left to recommend
        return
    title = "Log-probabilities, and by how many nats the factors together and each of them (F1, F2, …) raised them"
    heads = [f"F{factor + 1}" for factor in range(explanation.num_factors)]
    table = voice.table(title, "item", "title", "score", "without factors", "together", "", *heads, text=2)
    for item, effect in zip(explanation.recommendations, figures["items"], strict=True):
        total = (
            f"{effect['score']:.3f}",
            f"{effect['base_score']:.3f}",
            f"{effect['total']:+.3f}",
            effect["total_times"],
        )
        table.add_row(*voice.plain(item.item_id, item.title, *total, *(f"{c:+.3f}" for c in item.contributions)))
    voice.result(table)
    if figures["notice"]:
        voice.result(figures["notice"])


def main(argv: list[str]) -> int:
    options, rest = parse("explain", ABOUT, (ExplainOptions,), argv)
    from flr.report.drawing import WITHOUT, can_draw

    if not options.history:
        raise ValueError("history: expected item ids or titles, got none")
    if not (options.png or options.html or rest.json):
        options.html = "explanation.html"
        if can_draw():
            options.png = "explanation.png"
        else:
            voice.note(WITHOUT)
    if options.png and not can_draw():
        raise ValueError("png: expected matplotlib for a picture, got none; pip install 'flr[plots]'")
    from flr.recommend import Recommender

    recommender = Recommender.from_pretrained(options.model, revision=options.revision, **options.as_saved())
    if not recommender.num_factors:
        wanted = (
            f"one with factors, got {options.model} of the variant {recommender.variant}, which has none to explain"
        )
        raise ValueError(f"model: expected {wanted}; flr recommend gives its items")
    explanation = recommender.explain(options.history, k=options.k)
    say_effects(explanation)
    if options.png:
        explanation.heatmap(options.png)
        voice.result(f"Wrote {options.png}.")
    if options.html:
        explanation.html(options.html)
        voice.result(f"Wrote {options.html}.")
    emit(explanation.to_dict(), rest.json)
    return 0
