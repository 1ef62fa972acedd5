"""Decoding of a mixture over factors equals brute force: K forwards for every user and item."""

import pytest
import torch

import flr
from flr.decode import CatalogueTrie, beam_search, rank_one_token, score_all_items
from flr.decode import ways as ways_of
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.comparisons import assert_ranked
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import THOUGHT, toy_model, wake
from tests.helpers.naive_mixture import factor_scores, item_scores

SCORINGS = ("full", "catalogue")


def mixture(family="llama", **config):
    """A model whose factors disagree about what comes next."""
    model = flr.patch_model(toy_model(family), aggregation="mixture", thought_token_id=THOUGHT, **config)
    wake(model)
    return model


def prompts(lengths=(7, 3, 5)):
    inputs = toy_inputs(lengths)
    inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != THOUGHT, 20)
    return inputs


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_item_and_the_best(family, scoring):
    model, inputs, sequences = mixture(family), prompts(), random_catalogue(3)
    trie, expected = CatalogueTrie.from_codec(codec_of(sequences)), item_scores(model, inputs, sequences, scoring)
    scores = score_all_items(model, inputs, trie, scoring, chunk=3)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert_ranked(beam_search(model, inputs, trie, 14, 9, scoring), expected, 9)
    if scoring == "catalogue":
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))


def test_no_factor_alone_gives_the_order():
    """Else the tests above could not tell a mixture from one of its factors, or from even gates."""
    model, inputs, sequences = mixture(), prompts(), random_catalogue(3)
    gates, scores = factor_scores(model, inputs, sequences)
    mixed = (gates[..., None] + scores).logsumexp(1)
    for other in (*scores.unbind(1), scores.logsumexp(1), (gates.exp()[..., None] * scores).sum(1)):
        assert (other.argsort(1) != mixed.argsort(1)).any()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_one_token_items(scoring):
    model, inputs, sequences = mixture(num_factors=3, num_refinements=1), prompts(), [(t,) for t in range(59, 29, -1)]
    trie, allowed = CatalogueTrie.from_codec(codec_of(sequences)), torch.arange(30) % 3 != 0
    expected = item_scores(model, inputs, sequences, scoring, allowed)
    torch.testing.assert_close(rank_one_token(model, inputs, trie, scoring, allowed), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        score_all_items(model, inputs, trie, scoring, allowed=allowed), expected, atol=1e-4, rtol=1e-5
    )
    assert_ranked(beam_search(model, inputs, trie, 3, 12, scoring, allowed), expected, 12)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_filters_and_users_that_finish_early(scoring):
    """Catalogue scoring mixes what each factor gives the allowed items; users with few of them leave the batch."""
    model, inputs, sequences = mixture(), prompts((7, 3, 5, 6)), random_catalogue(5)
    allowed = torch.ones(4, 14, dtype=torch.bool)
    allowed[0, 1:] = allowed[1, 2:] = allowed[2, ::2] = False
    trie, expected = (
        CatalogueTrie.from_codec(codec_of(sequences)),
        item_scores(model, inputs, sequences, scoring, allowed),
    )
    scores = score_all_items(model, inputs, trie, scoring, allowed=allowed)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert_ranked(beam_search(model, inputs, trie, 14, 14, scoring, allowed), expected, 14)


def narrow_search(gates, sequences, scores_of, beams):
    """Beam search over prefixes by the mixture's probability; ``scores_of`` gives log p(prefix | thought_k) [K]."""
    running, found = [()], {}
    while running:
        nexts = sorted({s[: len(h) + 1] for h in running for s in sequences if s[: len(h)] == h})
        ranked = sorted(nexts, key=lambda h: -float((gates + scores_of(h)).logsumexp(0)))
        best = set(ranked[:beams])
        found |= {h: float((gates + scores_of(h)).logsumexp(0)) for h in nexts if h in sequences and h in best}
        running = [h for h in ranked if h not in sequences][:beams]
    return sorted(found.items(), key=lambda entry: -entry[1])


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_narrow_beams_choose_by_the_mixture(beams):
    model, inputs, sequences = mixture(), prompts((6,)), random_catalogue(11)
    prefixes = sorted({s[:n] for s in sequences for n in range(1, len(s) + 1)})
    gates, scores = factor_scores(model, inputs, prefixes)
    known = dict(zip(prefixes, scores[0].T, strict=True))
    expected = narrow_search(gates[0], sequences, known.get, beams)[:beams]
    result = beam_search(model, inputs, CatalogueTrie.from_codec(codec_of(sequences)), beams, beams)
    got = [sequences[i] for i in result.items[0].tolist() if i >= 0]
    assert got == [item for item, _ in expected]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_caches_that_cannot_be_packed(monkeypatch, scoring):
    model, inputs, sequences = mixture(), prompts(), random_catalogue(3)
    trie, expected = CatalogueTrie.from_codec(codec_of(sequences)), item_scores(model, inputs, sequences, scoring)
    monkeypatch.setattr(ways_of, "obstacle", lambda *_: "of this test")
    assert_ranked(beam_search(model, inputs, trie, 14, 9, scoring), expected, 9)
    scores = score_all_items(model, inputs, trie, scoring)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_a_step_is_one_forward_behind_a_prompt_that_is_encoded_once():
    model, inputs = mixture(), prompts()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3)))
    columns = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: columns.append((kwargs.get("inputs_embeds"), kwargs.get("input_ids"))), with_kwargs=True
    )
    beam_search(model, inputs, trie, 4, 4)
    widths = [(ids if embeds is None else embeds).shape[1] for embeds, ids in columns]
    assert widths[:2] == [7, 4]  # prompts, then K thoughts
    assert len(widths) == 1 + trie.depth
    assert max(widths[2:]) <= 16


@torch.no_grad()
def test_a_thought_that_is_given_is_continued_alone():
    model, inputs, sequences = mixture(), prompts(), random_catalogue(3)
    trie, (_, scores) = CatalogueTrie.from_codec(codec_of(sequences)), factor_scores(model, inputs, sequences)
    apart, _ = ways_of.thoughts_apart(model, inputs)
    for k, thought in enumerate(apart.thoughts.unbind(1)):
        given = {**inputs, "thoughts": thought[:, None]}
        torch.testing.assert_close(score_all_items(model, given, trie), scores[:, k], atol=1e-4, rtol=1e-5)
        assert_ranked(beam_search(model, given, trie, 14, 9), scores[:, k], 9)


def test_refused():
    model, trie = mixture(), CatalogueTrie.from_sequences([12, 13], [0, 1, 2])
    ids = torch.tensor([[5, 6, THOUGHT], [5, 6, 7]])
    for given in (ids, torch.tensor([[5, THOUGHT, THOUGHT]]), ids[:1, 2:]):
        with pytest.raises(ValueError, match="input_ids: expected prompts that end with one thought token"):
            beam_search(model, {"input_ids": given}, trie)
    with pytest.raises(ValueError, match=r"inputs: expected .* with aggregation mixture, got token_type_ids too"):
        beam_search(model, {"input_ids": ids[:1], "token_type_ids": ids[:1] * 0}, trie)
