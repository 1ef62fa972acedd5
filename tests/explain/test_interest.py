"""How far factors recover the interests that were planted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

import flr
from flr.data import Interactions, RecProcessor, build_tokenizer, planted_dataset
from flr.explain import agreement, assign_by_score, assign_factors, factor_interest
from tests.helpers.models import build_recommender, tiny_model


def test_assignment_is_relative_to_a_factors_own_attention():
    # factor 0 leaves nine tenths of its attention elsewhere; of the rest, it spends most on item 1
    attention = np.array([[0.01, 0.08, 0.01], [0.45, 0.1, 0.45], [0.0, 0.0, 0.0]])
    assert assign_factors(attention).tolist() == [1, 0, 1]
    assert assign_factors(np.zeros((2, 3))).tolist() == [0, 0, 0]
    assert assign_factors(np.stack([attention, attention])).shape == (2, 3)


def test_scores_know_nothing_of_a_rows_other_items():
    """What attention cannot say: an old item of a kind, and a kind that a row does not have."""
    scores = [np.array([[4.0, 9.0], [-4.0, -4.0]]), np.array([[-4.0, -4.0], [0.0, 5.0]])]
    assert [x.tolist() for x in assign_by_score(scores)] == [[0, 0], [1, 1]]
    looked = [np.exp(x - np.logaddexp.reduce(x, 1, keepdims=True)) for x in scores]
    assert [assign_factors(x).tolist() for x in looked] == [[1, 0], [0, 1]]
    moved = [x + np.array([[100.0], [-7.0]]) for x in scores]  # to which attention is blind
    assert [x.tolist() for x in assign_by_score(moved)] == [[0, 0], [1, 1]]


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
    """A model whose hidden states are its embeddings, and items along the direction of their interest.

    Factor k of the model looks along direction k.
    """
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
    assert factor_interest(model, processor, dataset.test, interests, batch_size=3, permutations=0).nmi == result.nmi
    json.dumps(result.to_dict())
    scored = factor_interest(model, processor, dataset.test, interests, by="scores")
    assert scored.nmi == pytest.approx(1)
    assert (scored.confusion == result.confusion).all()


def test_factors_that_look_at_the_latest_item_alone_are_found_by_their_scores():
    """With a strong preference for late items attention says little of the kinds, scores say all."""
    model, processor, dataset, interests = interested(perfect=True)
    with torch.no_grad():
        model.flr.key *= 50
    by = {by: factor_interest(model, processor, dataset.test, interests, by=by).nmi for by in ("attention", "scores")}
    assert by["attention"] < 0.9
    assert by["scores"] == pytest.approx(1)


def test_unrelated_factors_stay_at_chance():
    model, processor, dataset, interests = interested(perfect=False)
    result = factor_interest(model, processor, dataset.test, interests, permutations=20)
    assert result.nmi < 0.25
    rng = np.random.default_rng(0)
    nulls = [
        factor_interest(model, processor, dataset.test, rng.permutation(interests), permutations=0).nmi
        for _ in range(3)
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
    with pytest.raises(ValueError, match="by: expected attention or scores, got 'gates'"):
        factor_interest(recommender.model, recommender.processor, rows, np.zeros(40, int), by="gates")
    with pytest.raises(ValueError, match="history of two items"):
        factor_interest(
            recommender.model, recommender.processor, Interactions(["a", "b"], [[], [1]], [3, 3]), np.zeros(40, int)
        )
