"""The page and the heat map of an explanation."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.helpers.catalogues import NASTY, nasty_catalogue
from tests.helpers.models import build_recommender
from tests.helpers.pages import Checker


def test_files(tmp_path):
    recommender = build_recommender(catalogue=nasty_catalogue())
    explanation = recommender.explain(["item_0", "item_1", "item_2", "item_9"], k=30)
    path, out = tmp_path / "why.html", tmp_path / "deep" / "heat.png"
    explanation.html(path)
    text = path.read_text()
    assert NASTY.split(" & ")[0] not in text
    assert " ".join(Checker(text).text).count("<script>alert(1)</script>") >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation.heatmap(out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > picture.size[1] > 300
        assert len(set(picture.convert("RGB").resize((64, 64)).tobytes())) > 20  # not blank
    again = json.loads(json.dumps(explanation.to_dict()))
    assert again["history"][0]["title"] == NASTY
    assert np.array(again["attention"]).shape == (1, 2, 3, 4)
    assert again["recommendations"][0]["factor_shares"] == explanation.recommendations[0].factor_shares
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "heat.png", "why.html"]  # nothing temporary is left


def test_heat_maps_of_any_size(tmp_path):
    recommender = build_recommender(num_factors=2)
    recommender.processor.max_history = 40
    for size in (1, 20, 40):
        explanation = recommender.explain(np.arange(size) % 40, k=1)
        explanation.heatmap(tmp_path / f"{size}.png", refinement=0)
        explanation.html(tmp_path / f"{size}.html")
        Checker((tmp_path / f"{size}.html").read_text())
    for options in ({"refinement": 2}, {"thought": -2}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            explanation.heatmap(tmp_path / "no.png", **options)
    with pytest.raises(ValueError, match="at least one item"):
        recommender.explain([], k=1).heatmap(tmp_path / "no.png")
    recommender.explain([], k=1).html(tmp_path / "empty.html")
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("variant", ["anchor", "none", "latentr3"])
def test_other_variants(tmp_path, variant):
    explanation = build_recommender(variant=variant).explain(["item_1", "item_2"], k=2)
    explanation.html(tmp_path / "why.html")
    Checker((tmp_path / "why.html").read_text())
    assert explanation.variant == variant
    assert explanation.num_factors == (variant == "latentr3")
    if variant != "latentr3":
        with pytest.raises(ValueError, match="expected a model with factors"):
            explanation.heatmap(tmp_path / "no.png")
