"""Explanations of a mixture over factors, against K forwards for every item."""

import itertools

import numpy as np
import pytest
import torch

from flr.data import CSR
from flr.explain.interest import factor_interest
from tests.helpers import naive_mixture
from tests.helpers.models import build_recommender
from tests.helpers.naive import naive_scores
from tests.helpers.naive_mixture import factor_scores


def mixture(codec, **options):
    return build_recommender(codec, aggregation="mixture", **options)


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("codec", ["id", "title"])
def test_shares_are_responsibilities_and_contributions_add_up(monkeypatch, codec, scoring):
    recommender = mixture(codec)
    model, processor = recommender.model, recommender.processor
    thought = processor.thought_token_id
    monkeypatch.setattr(naive_mixture, "THOUGHT", thought)
    ids = processor.catalogue.item_ids
    histories = [[ids[i] for i in row] for row in ((1, 5, 9), (3, 7))]
    answers = recommender.recommend(histories, k=3, num_beams=40, scoring=scoring, shares=True)
    sequences = [tuple(int(t) for t in processor.item_codec.encode(i)) for i in range(len(ids))]
    inputs = processor([np.array([1, 5, 9]), np.array([3, 7])])
    prompts = {k: v[:, :-1] for k, v in inputs.items() if k != "item_positions"}
    gates, scores = (x.double() for x in factor_scores(model, prompts, sequences, scoring))
    joint = gates[..., None] + scores
    anchors = model.get_input_embeddings()(torch.full((1, 1), thought))
    inputs = {k: v for k, v in inputs.items() if k != "item_positions"}
    with monkeypatch.context() as patch:  # naive_scores reads prompts with their thought, here the anchor alone
        forward = model.forward
        patch.setattr(model, "forward", lambda **kwargs: forward(**kwargs, thoughts=anchors.detach()))
        alone = naive_scores(model, inputs, sequences, scoring).double()
    factors = gates.shape[1]
    for user, recommendations in enumerate(answers):
        assert [r.index for r in recommendations] == joint[user].logsumexp(0).argsort(descending=True)[:3].tolist()
        for r in recommendations:
            own = joint[user, :, r.index]
            np.testing.assert_allclose(r.score, float(own.logsumexp(0)), atol=1e-4)
            np.testing.assert_allclose(r.factor_shares, own.softmax(0), atol=1e-4)
            without = gates[user] + alone[user, r.index]

            def value(members, own=own, without=without):
                taken = [own[k] if k in members else without[k] for k in range(factors)]
                return float(torch.stack(taken).logsumexp(0))

            orders = list(itertools.permutations(range(factors)))
            expected = np.zeros(factors)
            for order in orders:
                for place, k in enumerate(order):
                    expected[k] += (value(order[: place + 1]) - value(order[:place])) / len(orders)
            np.testing.assert_allclose(r.contributions, expected, atol=1e-4)
            np.testing.assert_allclose(r.base_score, value(()), atol=1e-4)
    assert np.ptp([r.factor_shares for r in answers[0]], axis=0).max() > 1e-3  # not the gates


def test_explanation_says_what_its_shares_are(tmp_path):
    recommender = mixture("id")
    explanation = recommender.explain([recommender.processor.catalogue.item_ids[i] for i in (1, 5, 9)], k=2)
    assert (explanation.aggregation, explanation.num_factors) == ("mixture", 3)
    np.testing.assert_allclose(explanation.gates.sum(-1), 1, rtol=1e-5)
    explanation.html(tmp_path / "page.html")
    assert "own thought gives it" in (tmp_path / "page.html").read_text()


def test_offsets_attend_to_nothing(tmp_path):
    recommender = build_recommender("id", variant="offsets", anchor="last")
    explanation = recommender.explain([recommender.processor.catalogue.item_ids[i] for i in (1, 5, 9)], k=2)
    assert explanation.attention.shape == (1, 1, 3, 3)
    assert not explanation.attention.any()
    for r in explanation.recommendations:
        np.testing.assert_allclose(r.base_score + sum(r.contributions), r.score, atol=1e-4)
    explanation.html(tmp_path / "page.html")
    assert "Offsets attend to nothing" in (tmp_path / "page.html").read_text()
    interests = np.zeros(len(recommender.processor.catalogue))
    with pytest.raises(ValueError, match="model: expected one with factors that attend"):
        factor_interest(recommender.model, recommender.processor, CSR.from_rows([np.array([1, 5, 9])]), interests)
