"""The page of the quickstart, and its plots."""

from __future__ import annotations

import numpy as np
import pytest

from flr.recommend.recommender import Recommender
from flr.report.plots import plot_compare, summarise
from flr.report.quickstart import quickstart_report
from tests.helpers.catalogues import NASTY, nasty_catalogue
from tests.helpers.models import build_recommender
from tests.helpers.pages import Checker


def rows_of(seeds):
    rng = np.random.default_rng(0)
    return [
        {
            "mode": mode,
            "seed": s,
            "metrics": {"hr@10": 0.2 + rng.normal() / 100, "ndcg@10": 0.1, "mrr": 0.1},
            "seconds": 9.0,
        }
        for mode in ("none", "anchor", "flr <K>")
        for s in range(seeds)
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_report(tmp_path, seeds):
    recommender: Recommender = build_recommender(catalogue=nasty_catalogue())
    rows = rows_of(seeds)
    confusion = {"nmi": 0.5, "chance": 0.1, "chance_high": None, "confusion": [[5, 1], [0, 0]], "nmi_scores": 0.8123}
    quickstart_report(
        {
            "text": f"Made of {NASTY}",
            "rows": rows,
            "differences": {"flr <K>": {"ndcg@10": [0.01, -0.01, 0.02]}},
            "nmi": {"flr <K>": confusion},
            "names": {"anchor": f"a token {NASTY}"},
            "example": recommender.explain(["item_0", "item_1"]).to_dict(),
            "next_steps": ["flr sft --config <yours>"],
            "settings": {"seed": 0},
        },
        tmp_path / "report.html",
    )
    page = (tmp_path / "report.html").read_text()
    shown = " ".join(Checker(page).text)
    assert "flr <K>" in shown
    assert page.count("data:image/png") == 4  # two metrics, light, and dark for a page of that scheme
    assert page.count("<source media") == 2
    assert "NDCG@10 minus anchor" in shown
    assert "NMI by scores 0.812" in " ".join(shown.split())
    assert ("Small orange dots" in shown) == (seeds > 1)
    assert "nan" not in shown
    quickstart_report({}, tmp_path / "empty.html")
    with pytest.raises(ValueError, match="got rowz"):
        quickstart_report({"rowz": []}, tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


def test_intervals_and_missing_numbers(tmp_path):
    rows = [{"mode": "a", "seed": 0, "metrics": {"hr@10": 0.25}, "intervals": {"hr@10": (0.2, 0.3)}}]
    rows += [{"mode": "b", "seed": 0, "metrics": {"ndcg@10": 0.5}}]
    (a,) = summarise(rows, "hr@10")
    assert (a.mode, a.mean, a.low, a.high) == ("a", 0.25, 0.2, 0.3)
    (b,) = summarise(rows, "ndcg@10")
    assert (b.low, b.high) == (None, None)
    plot_compare(rows, tmp_path / "x.png")
    quickstart_report({"rows": rows}, tmp_path / "x.html")
    assert "0.0000" not in (tmp_path / "x.html").read_text()
    with pytest.raises(ValueError, match=r"expected metrics mrr, got hr@10, ndcg@10"):
        plot_compare(rows, tmp_path / "y.png", metrics=("mrr",))
