"""``flr explain``: what each factor looked at."""

from __future__ import annotations

from dataclasses import dataclass

from flr.config import option

from .parsing import REVISION, console, emit, parse
from .weights import WeightOptions

ABOUT = "Show which history items each factor attends to and what it contributed: heat map (PNG) and HTML page."


@dataclass
class ExplainOptions(WeightOptions):
    """For which history, and where to."""

    model: str = option("runs/sft", "Folder that flr sft wrote, or id of such a model on the Hub.")
    revision: str | None = option(None, REVISION)
    history: list[str] = option([], "Item ids or titles, oldest first.")
    k: int = option(5, "Recommendations that are explained.")
    png: str | None = option(None, "Heat map to write.")
    html: str | None = option(None, "Self-contained page to write.")


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
            console.print(WITHOUT, markup=False)
    if options.png and not can_draw():
        raise ValueError("png: expected matplotlib for a picture, got none; pip install 'flr[plots]'")
    from flr.recommend import Recommender

    recommender = Recommender.from_pretrained(options.model, revision=options.revision, **options.as_saved())
    explanation = recommender.explain(options.history, k=options.k)
    if options.png:
        explanation.heatmap(options.png)
        console.print(f"written: {options.png}")
    if options.html:
        explanation.html(options.html)
        console.print(f"written: {options.html}")
    emit(explanation.to_dict(), rest.json)
    return 0
