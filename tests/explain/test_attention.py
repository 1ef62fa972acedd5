"""Explanations and reports: attention of items, files that are what they claim, recovery of interests."""

from __future__ import annotations

import json
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

import flr
from flr.attribution import think
from flr.data import Interactions, RecProcessor, build_tokenizer, planted_dataset
from flr.decode.session import evaluating
from flr.explain import (
    agreement,
    assign_factors,
    explain,
    factor_interest,
    factor_interest_nmi,
    item_attention,
)
from flr.recommender import Recommender
from flr.report import plot_compare, quickstart_report, summarise
from tests.helpers.catalogues import NASTY, nasty_catalogue
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.models import build_recommender, tiny_model


class Checker(HTMLParser):
    """Elements are balanced, and nothing is loaded or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "b"), tag
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert value.startswith("data:image/png;base64,"), value[:80]
        if tag not in ("meta", "br", "img", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "rect")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(("codec", "thoughts"), [("id", 1), ("sid", 2)])
def test_attention_is_summed_over_the_tokens_of_an_item(codec, thoughts):
    recommender = build_recommender(codec, num_thoughts=thoughts)
    explanation = recommender.explain(["item_3", "item_4", "item_3"], k=2)
    assert explanation.attention.shape == (thoughts, 2, 3, 3)
    inputs = recommender.processor([[3, 4, 3]])
    with torch.no_grad():
        out = recommender.model(**{k: v for k, v in inputs.items() if k != "item_positions"}, use_cache=True)
    for step, ours in zip(out.flr.steps, explanation.attention, strict=True):
        alpha = step.attention[0]
        for entry in range(3):
            columns = (inputs["item_positions"][0, : alpha.shape[-1]] == entry).nonzero()[:, 0]
            assert len(columns) == (1 if codec == "id" else 3)
            np.testing.assert_allclose(ours[..., entry], alpha[..., columns].sum(-1), atol=1e-6)
    np.testing.assert_allclose(explanation.attention[0].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(explanation.gates, torch.stack([s.gates[0] for s in out.flr.steps]), atol=1e-6)
    np.testing.assert_allclose(explanation.gates.sum(-1), 1, atol=1e-5)
    unit = recommender.model.flr.config.input_scale * recommender.model.config.hidden_size**0.5
    np.testing.assert_allclose(explanation.norms[-1] * unit, out.flr.contributions[0].norm(dim=-1), rtol=1e-4)


def test_a_batch_equals_its_users_alone():
    recommender = build_recommender("sid")
    histories = [np.array([3, 4, 5]), np.array([7]), np.arange(12)]
    inputs = recommender.processor(histories)
    with evaluating(recommender.model):
        together = item_attention(think(recommender.model, inputs, 0), inputs["item_positions"], 12)
    found = recommender.recommend(histories, k=3)
    for history, attention, recommendations in zip(histories, together, found, strict=True):
        alone = recommender.explain(history, k=3)
        np.testing.assert_allclose(alone.attention, attention[..., : len(history)], atol=1e-5)
        assert not attention[..., len(history) :].any()
        assert_same_recommendations(alone.recommendations, recommendations)


def test_entries_too_far_back_are_marked():
    recommender = build_recommender()
    explanation = explain(recommender.model, recommender.processor, np.arange(12), k=1)
    assert [item.used for item in explanation.history] == [False] * 2 + [True] * 10
    assert not explanation.attention[..., :2].any()
    skipped = recommender.explain(["item_1", "nonsense"], k=1, on_unknown="skip")
    assert skipped.unknown == ["nonsense"]
    assert [item.item_id for item in skipped.history] == ["item_1"]


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


# ---------------------------------------------------------------- recovery of interests


def test_assignment_is_relative_to_a_factors_own_attention():
    # factor 0 leaves nine tenths of its attention elsewhere; of the rest, it spends most on item 1
    attention = np.array([[0.01, 0.08, 0.01], [0.45, 0.1, 0.45], [0.0, 0.0, 0.0]])
    assert assign_factors(attention).tolist() == [1, 0, 1]
    assert assign_factors(np.zeros((2, 3))).tolist() == [0, 0, 0]
    assert assign_factors(np.stack([attention, attention])).shape == (2, 3)


def test_agreement_of_perfect_and_of_random_assignments():
    rng = np.random.default_rng(0)
    interests = rng.integers(0, 4, 500)
    items = rng.integers(0, 500, 8000)
    rows = np.repeat(np.arange(800), 10)
    perfect = agreement(3 - interests[items], items, rows, interests, 4)
    assert perfect.nmi == pytest.approx(1)
    assert perfect.within_user == pytest.approx(1)
    assert (perfect.confusion > 0).sum() == 4
    assert perfect.confusion.sum() == perfect.num_items == 8000
    assert perfect.chance < 0.02 < perfect.within_user_chance < 0.6
    drawn = rng.integers(0, 4, 8000)
    random = agreement(drawn, items, rows, interests, 4)
    assert random.nmi < 0.003
    assert abs(random.within_user - random.within_user_chance) < 0.02
    assert random.nmi == pytest.approx(normalized_mutual_info_score(interests[items], drawn))
    own = [normalized_mutual_info_score(interests[items[rows == r]], drawn[rows == r]) for r in range(50)]
    several = [v for v, r in zip(own, range(50), strict=True) if len(set(interests[items[rows == r]])) > 1]
    part = rows < 50
    few = agreement(drawn[part], items[part], rows[part], interests, 4, permutations=0)
    assert few.within_user == pytest.approx(np.mean(several))
    assert few.chance is None
    assert agreement(drawn, items, rows, interests, 4).to_dict() == random.to_dict()


def interested(perfect: bool):
    """A model whose hidden states are its embeddings and whose factor k looks along direction k, and a catalogue of items along
    the direction of their interest."""
    dataset = planted_dataset(num_items=40, num_users=60, num_interests=4, seed=2)
    interests = dataset.catalogue.attributes["interest"]
    processor = RecProcessor(build_tokenizer(dataset.catalogue, "id"), dataset.catalogue)
    model = tiny_model()
    flr.patch_model(model, processor.tokenizer, flr.FLRConfig(num_factors=4, factor_size=4))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        table = model.get_input_embeddings().weight
        table.normal_(std=0.1 if perfect else 1.0)
        if perfect:
            first = processor.item_codec.tokens
            for item, interest in enumerate(interests):
                table[first[item], interest] += 3
        reasoner = model.flr
        reasoner.query.zero_()
        reasoner.factor_query.copy_(torch.eye(4))
        reasoner.key.zero_()
        for k in range(4):
            reasoner.key[k, k, k] = 4
    return model.eval(), processor, dataset, interests


def test_planted_interests_are_found():
    model, processor, dataset, interests = interested(perfect=True)
    result = factor_interest(model, processor, dataset.test, interests)
    assert result.nmi == pytest.approx(1)
    assert result.nmi > 3 * result.chance_high
    assert (result.confusion.argmax(1) == np.arange(4)).all()
    seen = np.minimum(dataset.test.histories.lengths, processor.max_history)
    assert result.num_items == seen[seen > 1].sum()
    assert factor_interest_nmi(model, processor, dataset.test, interests, batch_size=3) == result.nmi
    json.dumps(result.to_dict())


def test_unrelated_factors_stay_at_chance():
    model, processor, dataset, interests = interested(perfect=False)
    result = factor_interest(model, processor, dataset.test, interests, permutations=20)
    assert result.nmi < 0.25
    rng = np.random.default_rng(0)
    nulls = [
        factor_interest_nmi(model, processor, dataset.test, rng.permutation(interests), batch_size=64) for _ in range(3)
    ]
    assert max(nulls) < 2 * result.chance_high


def test_recovery_needs_factors_and_rows():
    recommender = build_recommender(variant="anchor")
    rows = Interactions(["ann"], [[1, 2]], [3])
    with pytest.raises(ValueError, match="expected one with factors"):
        factor_interest(recommender.model, recommender.processor, rows, np.zeros(40, int))
    recommender = build_recommender()
    with pytest.raises(ValueError, match=r"expected shape \(40,\)"):
        factor_interest(recommender.model, recommender.processor, rows, np.zeros(3, int))
    with pytest.raises(ValueError, match="history of two items"):
        factor_interest(
            recommender.model, recommender.processor, Interactions(["a", "b"], [[], [1]], [3, 3]), np.zeros(40, int)
        )


# ---------------------------------------------------------------- report


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
    plot_compare(rows, tmp_path / "compare.png")
    confusion = {"nmi": 0.5, "chance": 0.1, "chance_high": None, "confusion": [[5, 1], [0, 0]]}
    quickstart_report(
        {
            "text": f"Made of {NASTY}",
            "rows": rows,
            "differences": {"flr <K>": {"ndcg@10": [0.01, -0.01, 0.02]}},
            "nmi": {"flr <K>": confusion},
            "images": {tmp_path / "compare.png": "all modes"},
            "example": recommender.explain(["item_0", "item_1"]).to_dict(),
            "next_steps": ["flr sft --config <yours>"],
            "settings": {"seed": 0},
        },
        tmp_path / "report.html",
    )
    page = (tmp_path / "report.html").read_text()
    shown = " ".join(Checker(page).text)
    assert "flr <K>" in shown
    assert page.count("<svg") == 1
    assert "nan" not in shown
    quickstart_report({}, tmp_path / "empty.html")
    with pytest.raises(ValueError, match="got rowz"):
        quickstart_report({"rowz": []}, tmp_path / "no.html")
    (tmp_path / "fake.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="expected a PNG file"):
        quickstart_report({"images": [tmp_path / "fake.png"]}, tmp_path / "no.html")
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
