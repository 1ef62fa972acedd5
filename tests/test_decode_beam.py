"""Beam search: equal to brute force with W >= C, to transformers' constrained beam search below; filters; failing closed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decode_models import (
    VOCABULARY,
    assert_ranked,
    codec_of,
    naive_scores,
    random_catalogue,
    toy_inputs,
    toy_model,
)

import flr.decode.beam
from flr.decode import CatalogueTrie, beam_search, rank_one_token, score_all_items
from flr.decode.scoring import log_normaliser

RELAXED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def model():
    return toy_model("llama")


@st.composite
def catalogues(draw):
    """Prefix-free sequences of very different shapes: made by cutting a random tree at its leaves."""
    alphabet = draw(st.integers(1, 6))
    bodies = draw(st.lists(st.lists(st.integers(10, 9 + alphabet), min_size=0, max_size=5), min_size=1, max_size=12))
    unique = {tuple(b) for b in bodies}
    if draw(st.booleans()):  # close with a terminator: bodies may be prefixes of each other
        sequences = [(*b, 9) for b in unique]
    else:
        sequences = [b for b in unique if b and not any(o != b and o[: len(b)] == b for o in unique)]
        sequences = sequences or [(10,)]
    if draw(st.integers(0, 4)) == 0:
        sequences.append((30,) * 80)
    return draw(st.permutations(sequences))


@RELAXED
@given(sequences=catalogues(), scoring=st.sampled_from(["full", "catalogue"]), data=st.data())
def test_enough_beams_equal_brute_force(model, sequences, scoring, data):
    inputs, count = toy_inputs(), len(sequences)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    kind = data.draw(st.sampled_from(["none", "shared", "mask", "exclude", "both"]))
    allowed, arguments = torch.ones(3, count, dtype=torch.bool), {}
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    if kind == "shared":
        row = torch.tensor(data.draw(flags))
        allowed, arguments = row.expand(3, -1), {"allowed": row}
    if kind in ("mask", "both"):
        allowed = torch.tensor([data.draw(flags) for _ in range(3)])
        arguments = {"allowed": allowed}
    if kind in ("exclude", "both"):
        entries = st.lists(st.integers(-1, count - 1), min_size=5, max_size=5)
        exclude = torch.tensor([data.draw(entries) for _ in range(3)])
        hit = (exclude[:, :, None] == torch.arange(count)).any(1)
        allowed, arguments = allowed & ~hit, {**arguments, "exclude": exclude}
    expected = naive_scores(model, inputs, sequences, scoring, allowed)
    k = data.draw(st.integers(1, count + 2))
    found = beam_search(model, inputs, trie, max(count, 1), k, scoring, **arguments)
    assert_ranked(found, expected, k)
    chunk = data.draw(st.integers(1, 30))
    scores = score_all_items(model, inputs, trie, scoring, chunk, **arguments)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def transformers_beam_search(model, inputs, sequences, num_beams):
    """Items and scores of `generate` under a prefix constraint, one list a user; hypotheses of probability 0 left out."""
    children: dict[tuple[int, ...], set[int]] = {}
    for s in sequences:
        for step in range(len(s)):
            children.setdefault(s[:step], set()).add(s[step])
    prompt = inputs["input_ids"].shape[1]
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        prefix_allowed_tokens_fn=lambda _, ids: sorted(children.get(tuple(ids[prompt:].tolist()), {9})),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        top_k=None,
        early_stopping="never",
        length_penalty=0.0,
        max_new_tokens=max(len(s) for s in sequences),
        return_dict_in_generate=True,
        output_scores=True,
    )
    index = {s: i for i, s in enumerate(sequences)}
    found: list[list[tuple[int, float]]] = [[] for _ in inputs["input_ids"]]
    for n, (ids, score) in enumerate(
        zip(out.sequences[:, prompt:].tolist(), out.sequences_scores.tolist(), strict=True)
    ):
        if score > -1e8:
            ids = ids[: ids.index(9) + 1] if 9 in ids else ids
            found[n // num_beams].append((index[tuple(ids)], score))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("num_beams", [2, 3, 7])
def test_few_beams_equal_transformers(family, num_beams):
    model, inputs = toy_model(family, seed=1), toy_inputs((9, 4, 6))
    codes = torch.cartesian_prod(*[torch.arange(10, 18)] * 3)[::5].tolist()  # three tokens an item, no terminator
    apart = 0
    for sequences in (
        random_catalogue(0, 50, 4, 6),
        random_catalogue(1, 25, 7, 2),
        random_catalogue(2, 9, 3, 3),
        [tuple(c) for c in codes],
    ):
        trie = CatalogueTrie.from_codec(codec_of(sequences))
        expected = transformers_beam_search(model, inputs, sequences, num_beams)
        found = beam_search(model, inputs, trie, num_beams, num_beams)
        for row in range(3):
            n = len(expected[row])
            assert found.items[row].tolist() == [i for i, _ in expected[row]] + [-1] * (num_beams - n)
            torch.testing.assert_close(
                found.scores[row, :n], torch.tensor([s for _, s in expected[row]]), atol=1e-4, rtol=1e-5
            )
        apart += len({tuple(x) for x in found.items.tolist()}) > 1
    assert apart >= 2, "the toy must tell users apart"


def test_fewer_beams_miss_what_more_beams_find(model):
    """The toy is not so easy that any beam width gives the exact answer."""
    sequences = random_catalogue(0, 60, 5, 5)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    narrow, wide = (beam_search(model, toy_inputs(), trie, w, 3).items.tolist() for w in (1, 60))
    assert narrow != wide


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_few_beams_do_not_depend_on_batch_blocks_or_k(model, monkeypatch, scoring):
    sequences = random_catalogue(8, 60, 5, 6)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    expected = beam_search(model, toy_inputs(), trie, 6, 6, scoring)
    fewer = beam_search(model, toy_inputs(), trie, 6, 2, scoring)  # a smaller k may stop earlier
    assert fewer.items.tolist() == expected.items[:, :2].tolist()
    changes = [("_MAX_CANDIDATES", 20), ("_sync_is_free", lambda _: False)]  # the second: as on a GPU
    for name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(flr.decode.beam, name, value)
            other = beam_search(model, toy_inputs(), trie, 6, 6, scoring)
        assert other.items.tolist() == expected.items.tolist()
        torch.testing.assert_close(other.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_catalogue_probabilities_sum_to_one(model):
    sequences = random_catalogue(2, 30, 5, 3)
    scores = score_all_items(model, toy_inputs(), codec_of(sequences), "catalogue")
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), atol=1e-5, rtol=0)
    allowed = torch.arange(30) % 4 == 0
    scores = score_all_items(model, toy_inputs(), codec_of(sequences), "catalogue", allowed=allowed)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), atol=1e-5, rtol=0)


def test_catalogue_scoring_stops_at_unique_prefixes(model):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    trie = CatalogueTrie.from_codec(codec_of([(10, *range(20, 50)), (11, *range(20, 50)), (12, 13)]))
    found = beam_search(model, toy_inputs(), trie, 5, 3, "catalogue")
    handle.remove()
    assert len(calls) == 1
    assert sorted(found.items[0].tolist()) == [0, 1, 2]


def test_excluded_subtree_takes_no_beam(model):
    """With one beam, the best item outside the excluded favourite subtree is found although the subtree scores higher."""
    sequences = [(10, 20), (10, 21), (11, 20), (12, 21)]
    trie, inputs = CatalogueTrie.from_codec(codec_of(sequences)), toy_inputs()
    for first in (10, 11, 12):
        banned = torch.tensor([[i for i, s in enumerate(sequences) if s[0] == first]]).expand(3, -1)
        found = beam_search(model, inputs, trie, 1, 1, exclude=banned)
        assert (found.items >= 0).all()
        assert not (found.items == banned).any()


@pytest.mark.parametrize("length_penalty", [-1.0, 0.5, 2.0])
def test_length_penalty_divides_by_length(model, length_penalty):
    sequences, inputs = random_catalogue(9, 20, 6, 3), toy_inputs()
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.float32)
    for scoring in ("full", "catalogue"):
        expected = naive_scores(model, inputs, sequences, scoring) / lengths**length_penalty
        for k in (3, 20):
            found = beam_search(model, inputs, trie, 20, k, scoring, length_penalty=length_penalty)
            assert_ranked(found, expected, k, tolerance=1e-3)


def test_ties_go_to_the_smaller_index():
    model = toy_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token as likely as any other
    sequences = [(14, 9), (12, 9), (13, 9), (10, 9), (11, 9)]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    for scoring in ("full", "catalogue"):
        assert beam_search(model, toy_inputs(), trie, 5, 5, scoring).items.tolist() == [[0, 1, 2, 3, 4]] * 3
    # too few beams: those with lexicographically smaller tokens stay
    assert beam_search(model, toy_inputs(), trie, 2, 2).items.tolist() == [[3, 4]] * 3


def test_nothing_allowed_is_empty_not_an_error(model):
    sequences = random_catalogue(1)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    allowed = torch.ones(3, len(sequences), dtype=torch.bool)
    allowed[1] = False
    found = beam_search(model, toy_inputs(), trie, 5, 5, allowed=allowed)
    assert found.items[1].tolist() == [-1] * 5
    assert found.scores[1].tolist() == [-torch.inf] * 5
    assert (found.items[[0, 2]] >= 0).all()
    unconstrained = beam_search(model, toy_inputs(), trie, 5, 5)
    assert found.items[[0, 2]].tolist() == unconstrained.items[[0, 2]].tolist()
    none = beam_search(
        model, toy_inputs(), trie, 5, 5, "catalogue", allowed=torch.zeros(len(sequences), dtype=torch.bool)
    )
    assert (none.items == -1).all()


def test_empty_batch(model):
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(1)))
    empty = {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}
    assert beam_search(model, empty, trie, 5, 5).items.shape == (0, 5)
    assert score_all_items(model, empty, trie).shape == (0, 14)


def test_fails_closed(model):
    inputs = toy_inputs()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(1)))
    with pytest.raises(ValueError, match="token 99, the model's vocabulary has 61"):
        beam_search(model, inputs, CatalogueTrie.from_sequences([99], [0, 1]))
    with pytest.raises(ValueError, match="padded on the left"):
        beam_search(model, {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}, trie)
    with pytest.raises(ValueError, match="scoring must be one of"):
        beam_search(model, inputs, trie, scoring="fast")
    with pytest.raises(ValueError, match="num_beams and k"):
        beam_search(model, inputs, trie, num_beams=0)
    with pytest.raises(ValueError, match="allowed must be bool"):
        beam_search(model, inputs, trie, allowed=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="exclude must hold item indices"):
        beam_search(model, inputs, trie, exclude=torch.full((3, 1), 14))
    with pytest.raises(ValueError, match="labels"):
        beam_search(model, {**inputs, "labels": inputs["input_ids"]}, trie)
    with pytest.raises(ValueError, match="items of one token"):
        rank_one_token(model, inputs, trie)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_logits_are_an_error(value):
    model = toy_model("llama")
    trie = CatalogueTrie.from_codec(codec_of([(10, 9), (11, 9)]))
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    for call in (beam_search, score_all_items):
        for scoring in ("full", "catalogue"):
            with pytest.raises(FloatingPointError):
                call(model, toy_inputs(), trie, scoring=scoring)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normaliser(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 100_003, generator=generator).mul_(5).to(dtype)
    logits[0, 0, 7], logits[0, 1, :-1], logits[0, 2] = 1e4, -torch.inf, logits[0, 2] - 1e4
    expected = torch.logsumexp(logits.double(), -1).float()
    torch.testing.assert_close(log_normaliser(logits), expected, atol=1e-5, rtol=1e-6)
    broken = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [-float("inf"), -float("inf")]])
    assert not log_normaliser(broken).isfinite().any()


def test_only_catalogue_items_whatever_the_generation_config(model):
    """A vocabulary-wide favourite outside the trie, top_k = 1 and sampling leave the ranking alone."""
    sequences = random_catalogue(1)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    before = beam_search(model, toy_inputs(), trie, 14, 14)
    assert (before.items.sort(1).values == torch.arange(14)).all()
    model.generation_config.update(top_k=2, temperature=9.0, repetition_penalty=3.0)
    after = beam_search(model, toy_inputs(), trie, 14, 14)
    assert before.items.tolist() == after.items.tolist()


def test_training_flags_come_back():
    model = toy_model("gpt2")  # dropout 0.1
    model.train()
    model.transformer.h[0].eval()
    flags = [m.training for m in model.modules()]
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(1)))
    first, second = (beam_search(model, toy_inputs(), trie).scores for _ in range(2))
    assert torch.equal(first, second)
    assert [m.training for m in model.modules()] == flags


def test_low_precision_models(model):
    sequences = random_catalogue(1)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    for family in ("llama", "gemma2"):  # sdpa and eager
        low = toy_model(family).to(torch.bfloat16)
        found = beam_search(low, toy_inputs(), trie, 14, 14)
        expected = score_all_items(low, toy_inputs(), trie)
        assert found.scores.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(expected.gather(1, found.items), found.scores, atol=0.3, rtol=0.05)
    assert trie.max_token < VOCABULARY
