"""Beam search: equal to brute force with W >= C, to transformers' constrained beam search below; failing closed."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flr.decode.beam
import flr.decode.prompts
import flr.decode.search
from flr.data import Catalogue, build_codec, build_tokenizer
from flr.decode import CatalogueTrie, beam_search, rank_one_token, score_all_items
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.comparisons import assert_ranked
from tests.helpers.inputs import row_of, toy_inputs
from tests.helpers.models import VOCAB, tiny_llama, toy_model
from tests.helpers.naive import naive_scores

RELAXED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
    scored = expected
    if not (renormalise := data.draw(st.booleans())):
        scored = naive_scores(model, inputs, sequences, scoring, torch.ones_like(allowed))
        scored = scored.masked_fill(~allowed, -torch.inf)
    k = data.draw(st.integers(1, count + 2))
    kernel = data.draw(st.booleans())  # the steps that a GPU takes
    with mock.patch.object(flr.decode.beam, "runs_as_kernel", return_value=kernel):
        found = beam_search(model, inputs, trie, max(count, 1), k, scoring, **arguments, renormalise=renormalise)
    assert_ranked(found, scored, k)
    chunk = data.draw(st.integers(1, 30))
    scores = score_all_items(model, inputs, trie, scoring, chunk, **arguments)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def transformers_beam_search(model, inputs, sequences, num_beams):
    """Items and scores of ``generate`` under a prefix constraint, a list a user, without those of probability 0."""
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


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("num_beams", [2, 3, 7])
def test_few_beams_equal_transformers(family, num_beams, kernel, monkeypatch):
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: kernel)
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


@torch.no_grad()
def plain_catalogue_beams(model, prompt, items, num_beams, k):
    """The documented semantics of `catalogue` in plain Python for one user; items maps allowed sequences to indices."""
    logits = {}

    def below(prefix):
        return [s for s in items if s[: len(prefix)] == prefix]

    def choices(prefix):
        return sorted({s[len(prefix)] for s in below(prefix)})

    def branching(prefix):
        while len(choices(prefix)) == 1:
            prefix = (*prefix, *choices(prefix))
        return prefix

    found = [(0.0, items[s]) for s in items] if len(items) == 1 else []
    beams = [(0.0, branching(()))] if len(items) > 1 else []
    while beams:
        continuations = []
        for score, prefix in beams:
            if prefix not in logits:
                ids = torch.cat([prompt, torch.tensor(prefix, dtype=torch.int64)])[None]
                logits[prefix] = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            own = logits[prefix][choices(prefix)].log_softmax(0).tolist()
            continuations += [(score + p, (*prefix, t)) for t, p in zip(choices(prefix), own, strict=True)]
        continuations.sort(key=lambda c: (-c[0], c[1]))
        found += [(s, items[below(p)[0]]) for s, p in continuations[: max(num_beams, k)] if len(below(p)) == 1]
        beams = [(s, branching(p)) for s, p in continuations if len(below(p)) > 1][:num_beams]
    return sorted(found, key=lambda x: (-x[0], x[1]))[:k]


@pytest.mark.parametrize(("session", "kernel"), [("packed", False), ("expanded", False), ("packed", True)])
@pytest.mark.parametrize("num_beams", [1, 2, 4, 9])
def test_few_beams_of_catalogue_scoring_equal_plain_python(model, monkeypatch, num_beams, session, kernel):
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: kernel)
    if session == "expanded":
        monkeypatch.setattr(flr.decode.prompts, "obstacle", lambda *_: "test")
    inputs = toy_inputs((9, 4, 6))
    longer = [(*range(30, 36), *s) for s in random_catalogue(4, 12, 4, 2)]
    for sequences in (
        random_catalogue(0, 40, 6, 3),
        random_catalogue(5, 15, 4, 2) + longer,  # a chain of six tokens above a third of the items
        longer,  # nothing to choose at the root
    ):
        trie = CatalogueTrie.from_codec(codec_of(sequences))
        generator = torch.Generator().manual_seed(num_beams)
        some = torch.rand(3, len(sequences), generator=generator) < 0.3
        for allowed in (None, some):
            found = beam_search(model, inputs, trie, num_beams, 5, "catalogue", allowed)
            for row in range(3):
                may = [allowed is None or bool(allowed[row, i]) for i in range(len(sequences))]
                items = {s: i for i, s in enumerate(sequences) if may[i]}
                expected = plain_catalogue_beams(model, row_of(inputs, row), items, num_beams, 5)
                n = len(expected)
                assert found.items[row].tolist() == [i for _, i in expected] + [-1] * (5 - n)
                torch.testing.assert_close(
                    found.scores[row, :n], torch.tensor([s for s, _ in expected]), atol=1e-4, rtol=1e-5
                )


def test_catalogue_probabilities_sum_to_one(model):
    sequences = random_catalogue(2, 30, 5, 3)
    scores = score_all_items(model, toy_inputs(), codec_of(sequences), "catalogue")
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), atol=1e-5, rtol=0)
    allowed = torch.arange(30) % 4 == 0
    scores = score_all_items(model, toy_inputs(), codec_of(sequences), "catalogue", allowed=allowed)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), atol=1e-5, rtol=0)


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


def test_ties_go_to_the_smaller_index(monkeypatch):
    model = toy_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token as likely as any other
    sequences = [(14, 9), (12, 9), (13, 9), (10, 9), (11, 9)]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    for scoring in ("full", "catalogue"):
        assert beam_search(model, toy_inputs(), trie, 5, 5, scoring).items.tolist() == [[0, 1, 2, 3, 4]] * 3
    # too few beams: those with lexicographically smaller tokens stay
    assert beam_search(model, toy_inputs(), trie, 2, 2).items.tolist() == [[3, 4]] * 3
    # of whatever depth, and in whatever block of candidates
    trie = CatalogueTrie.from_codec(codec_of([(11, 5), (11, 6), (10, 20, 5), (10, 20, 6)]))
    for size in (flr.decode.search._MAX_CANDIDATES, 1):
        monkeypatch.setattr(flr.decode.search, "_MAX_CANDIDATES", size)
        assert beam_search(model, toy_inputs(), trie, 2, 2, "catalogue").items.tolist() == [[2, 3]] * 3


@pytest.mark.parametrize("num_beams", [2, 3, 5, 9])
def test_a_last_place_that_is_shared_goes_to_the_smaller_tokens(num_beams):
    """Whoever stands before it."""
    model, first = toy_model("llama"), 15
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(lambda _, args, out: out.index_fill(-1, torch.tensor([first]), 1.0))
    tokens = range(10, 40)
    sequences = [(t, 9) for t in reversed(tokens)]
    found = beam_search(model, toy_inputs(), CatalogueTrie.from_codec(codec_of(sequences)), num_beams, num_beams)
    kept = {first, *[t for t in tokens if t != first][: num_beams - 1]}
    assert {sequences[i][0] for i in found.items[0].tolist()} == kept


@pytest.mark.parametrize("kernel", [False, True])
def test_a_hypothesis_that_can_still_tie_goes_on(kernel, monkeypatch):
    """Its next token is certain, so that it will end level with the best item so far, whose index is greater."""
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: kernel)
    model = toy_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(lambda _, args, out: out.index_fill(-1, torch.tensor([20]), 200.0))
    trie = CatalogueTrie.from_codec(codec_of([(10, 20, 20), (11, 20), (10, 21, 20)]))
    found = beam_search(model, toy_inputs(), trie, 2, 1)
    assert found.items.tolist() == [[0]] * 3
    assert found.scores.tolist() == [[-200.0]] * 3


def test_empty_batch(model):
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(1)))
    empty = {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}
    assert beam_search(model, empty, trie, 5, 5).items.shape == (0, 5)
    assert score_all_items(model, empty, trie).shape == (0, 14)


def test_fails_closed(model):
    inputs = toy_inputs()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(1)))
    with pytest.raises(ValueError, match="vocabulary of 61, got 99"):
        beam_search(model, inputs, CatalogueTrie.from_sequences([99], [0, 1]))
    with pytest.raises(ValueError, match="padded on the left"):
        beam_search(model, {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}, trie)
    with pytest.raises(ValueError, match="scoring: expected one of"):
        beam_search(model, inputs, trie, scoring="fast")
    for number in ("num_beams", "k"):
        with pytest.raises(ValueError, match="num_beams, k: expected"):
            beam_search(model, inputs, trie, **{number: 0})
    with pytest.raises(ValueError, match="allowed: expected bool"):
        beam_search(model, inputs, trie, allowed=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="exclude: expected item indices"):
        beam_search(model, inputs, trie, exclude=torch.full((3, 1), 14))
    with pytest.raises(ValueError, match="labels"):
        beam_search(model, {**inputs, "labels": inputs["input_ids"]}, trie)
    hidden = flr.decode.prompts.prefill(model, inputs, trie.depth, want_hidden=True)
    with pytest.raises(ValueError, match="prompts: expected logits as their states under scoring 'full', got hidden"):
        beam_search(model, inputs, trie, prompts=hidden)
    for tokens in (trie, CatalogueTrie.from_sequences([12, 13, 14], [0, 2, 3])):
        with pytest.raises(ValueError, match="items of one token"):
            rank_one_token(model, inputs, tokens)


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


def test_an_infinite_logit_is_an_error_whatever_its_token():
    """Of one outside the catalogue it would take all probability, and leave every item as good as another."""
    for sequences in (random_catalogue(1), [(t,) for t in range(10, 20)]):
        for token in (sequences[3][0], VOCAB - 1):
            model, trie = toy_model("llama"), CatalogueTrie.from_codec(codec_of(sequences))

            def broken(_, args, out, token=token):
                out[1, -1, token] = torch.inf  # of one user

            model.lm_head.register_forward_hook(broken)
            for call in (beam_search, score_all_items, *([rank_one_token] if trie.depth == 1 else [])):
                with pytest.raises(FloatingPointError):
                    call(model, toy_inputs(), trie)


def test_titles_that_repeat_and_begin_each_other_end_to_end():
    """From titles over the codec to items: equal to brute force, and equal titles are told apart."""
    titles = ["Blue", "Blue", "Blue Train", "Blue Train Live", "B", "Kind of Blue", "Blue Train", "Bl"]
    catalogue = Catalogue([f"i{n}" for n in range(len(titles))], titles)
    tokenizer = build_tokenizer(catalogue, "title", vocab_size=300)
    codec = build_codec("title", catalogue, tokenizer)
    sequences = [tuple(codec.encode(i)) for i in range(len(titles))]
    torch.manual_seed(0)
    model, inputs = tiny_llama(len(tokenizer), initializer_range=0.25).eval(), toy_inputs()
    trie = CatalogueTrie.from_codec(codec)
    for scoring in ("full", "catalogue"):
        expected = naive_scores(model, inputs, sequences, scoring)
        assert_ranked(beam_search(model, inputs, trie, 8, 8, scoring), expected, 8)


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
    assert trie.max_token < VOCAB
