"""What each factor likes, on a model whose factors look along the interests."""

from __future__ import annotations

import pytest

from flr.explain import factor_likes
from tests.explain.test_interest import interested
from tests.helpers.models import build_recommender


def test_a_factor_likes_the_items_of_its_interest():
    model, processor, dataset, interests = interested(perfect=True)
    likes = factor_likes(model, processor, dataset.test, top=5)
    index = {item_id: i for i, item_id in enumerate(dataset.catalogue.item_ids)}
    assert len(likes) == 4
    for factor, liked in enumerate(likes):
        assert len(liked["items"]) >= 3
        assert {int(interests[index[item["item_id"]]]) for item in liked["items"]} == {factor}
        lifts = [item["lift"] for item in liked["items"]]
        assert lifts == sorted(lifts, reverse=True)
        assert lifts[-1] > 1
    assert factor_likes(model, processor, dataset.test, top=5, batch_size=3) == likes


def test_rare_items_do_not_lead():
    model, processor, dataset, _ = interested(perfect=True)
    free = factor_likes(model, processor, dataset.test, prior=0.0)
    held = factor_likes(model, processor, dataset.test, prior=50.0)
    assert all(a["items"][0]["lift"] > b["items"][0]["lift"] for a, b in zip(free, held, strict=True))


def test_a_model_without_factors_is_refused():
    recommender = build_recommender(variant="anchor")
    with pytest.raises(ValueError, match="expected one with factors"):
        factor_likes(recommender.model, recommender.processor, interested(perfect=False)[2].test)
