"""Attention that factors pay to items of a history."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flr.explain import item_attention, item_scores
from flr.explain.thinking import think
from flr.model.backbone import evaluating
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.models import build_recommender


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
    found = recommender.recommend(histories, k=3, shares=True)
    for history, attention, recommendations in zip(histories, together, found, strict=True):
        alone = recommender.explain(history, k=3)
        np.testing.assert_allclose(alone.attention, attention[..., : len(history)], atol=1e-5)
        assert not attention[..., len(history) :].any()
        assert_same_recommendations(alone.recommendations, recommendations)


def test_entries_too_far_back_are_marked():
    recommender = build_recommender()
    explanation = recommender.explain(np.arange(12), k=1)
    assert [item.used for item in explanation.history] == [False] * 2 + [True] * 10
    assert not explanation.attention[..., :2].any()
    skipped = recommender.explain(["item_1", "nonsense"], k=1, on_unknown="skip")
    assert skipped.unknown == ["nonsense"]
    assert [item.item_id for item in skipped.history] == ["item_1"]


@pytest.mark.parametrize("variant", ["flr", "latentr3"])
def test_attention_is_scores_that_were_shared_out(variant):
    recommender = build_recommender("sid", variant=variant)
    inputs = recommender.processor([[3, 4, 5], [7, 8, 9]])
    with evaluating(recommender.model), torch.no_grad():
        prompts = think(recommender.model, inputs, 0)
        attention, scores = (f(prompts, inputs["item_positions"], 4) for f in (item_attention, item_scores))
    assert scores.shape == attention.shape
    assert np.isneginf(scores[..., 3]).all()
    assert not attention[..., 3].any()
    scores, attention = scores[..., :3], attention[..., :3]
    shared = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(shared, attention / attention.sum(-1, keepdims=True), rtol=1e-4)
    assert np.abs(shared - 1 / 3).max() > 1e-3
