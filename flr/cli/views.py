"""``flr views``: what a model says to single items of a history, in its answer with the weight that valid asks for."""

from __future__ import annotations

from dataclasses import replace

from . import voice
from .mixing import MixingOptions, shown
from .options import DataOptions
from .parsing import emit, parse

ABOUT = "Mix what a model says to each item of a history alone into its answer, with the weight that ranks valid best."


def main(argv: list[str]) -> int:
    options, data, rest = parse("views", ABOUT, (MixingOptions, DataOptions), argv)
    weights = options.checked()
    if data.views_weight is not None:
        raise ValueError(f"views_weight: expected none, since --weights are tried here, got {data.views_weight:g}")
    from flr.data import HistoryViews
    from flr.evaluate.neighbours import fit_views

    dataset = data.announce()
    model, processor = options.loaded(data, dataset)
    saved = before = processor.views or HistoryViews(weight=0.0)
    if data.views_decay is not None:
        saved = replace(saved, decay=data.views_decay)
    processor.views = saved
    rows = dataset.valid.spread(options.max_users)
    fit = fit_views(model, processor, rows, weights, **options.sizes())
    means = shown("views", fit, len(rows))
    if not options.dry_run:
        options.save(before, replace(saved, weight=fit.best))
        voice.note(f"{options.model} answers with views at weight {fit.best:g} from now on.")
    found = {"weights": list(fit.weights), "best": fit.best, "decay": saved.decay, "rows": len(rows), "metrics": means}
    emit(found, rest.json)
    return 0
