"""Beam search: equal to brute force with W >= C, to transformers' constrained beam search below; filters; failing closed."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flr.decode.beam
import flr.decode.scoring
import flr.decode.session
from flr.data import Catalogue, build_codec, build_tokenizer
from flr.decode import CatalogueTrie, beam_search, rank_one_token, score_all_items
from flr.decode.scoring import log_normaliser
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.comparisons import assert_ranked
from tests.helpers.inputs import row_of, toy_inputs
from tests.helpers.models import VOCAB, tiny_llama, toy_model
from tests.helpers.naive import naive_scores

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
    kernel = data.draw(st.booleans())  # the steps that a GPU takes
    with mock.patch.object(flr.decode.beam, "runs_as_kernel", return_value=kernel):
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
        monkeypatch.setattr(flr.decode.session, "_packing_obstacle", lambda *_: "test")
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


def count_work(model, call):
    """Rows of each forward of the model [calls, (users, tokens)], and rows that the lm_head worked on in each."""
    forwards, heads = [], []
    hooks = [
        model.register_forward_pre_hook(
            lambda m, a, kw: forwards.append(tuple(kw["input_ids"].shape)), with_kwargs=True
        ),
        model.lm_head.register_forward_hook(lambda m, a, out: heads.append(out.numel() // VOCAB)),
    ]
    call()
    for hook in hooks:
        hook.remove()
    return forwards, heads


def test_catalogue_scoring_runs_the_lm_head_once_and_reads_chains_with_the_next_choice(model):
    chain = tuple(range(20, 32))
    sequences = [(10, *chain, 40), (10, *chain, 41), (10, *chain, 42, 43), (11, 9), (12, 9)]
    trie, inputs = CatalogueTrie.from_codec(codec_of(sequences)), toy_inputs()
    forwards, heads = count_work(model, lambda: beam_search(model, inputs, trie, 5, 5, "catalogue"))
    assert forwards == [(3, 7), (3, 13)]  # prompt; token 10 and the chain together
    assert heads == [3, 0]  # of the vocabulary: after the prompt only
    forwards, heads = count_work(model, lambda: beam_search(model, inputs, trie, 5, 5, "full"))
    assert len(forwards) == 15
    assert min(heads) > 0
    only = torch.tensor([[0, 1, -1]]).expand(3, -1)  # no choice before the last token: no step at the root
    forwards, _ = count_work(model, lambda: beam_search(model, inputs, trie, 5, 5, "catalogue", only=only))
    assert forwards == [(3, 7), (3, 13)]
    forwards, _ = count_work(model, lambda: beam_search(model, inputs, trie, 5, 5, "catalogue", only=only[:, :1]))
    assert forwards == [(3, 7)]


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("session", ["packed", "expanded"])
def test_finished_users_leave_the_batch(model, monkeypatch, scoring, session):
    if session == "expanded":
        monkeypatch.setattr(flr.decode.session, "_packing_obstacle", lambda *_: "test")
    sequences = random_catalogue(8, 60, 5, 4)
    trie, inputs = CatalogueTrie.from_codec(codec_of(sequences)), toy_inputs((5, 9, 4, 7, 3))
    shallow = [i for i, s in enumerate(sequences) if len(s) <= 3]
    allowed = torch.ones(5, 60, dtype=torch.bool)
    for row in (0, 3):
        allowed[row] = False
        allowed[row, shallow] = True
    found, widths = {}, {}
    for threshold in (0.0, 0.75, 1.0):
        monkeypatch.setattr(flr.decode.beam, "_LEAVE_BELOW", threshold)
        call = functools.partial(beam_search, model, inputs, trie, 6, 6, scoring, allowed)
        forwards, _ = count_work(model, lambda call=call, at=threshold: found.update({at: call()}))
        widths[threshold] = [users for users, _ in forwards[1:]]
    if session == "packed":
        assert set(widths[0.0]) == {5}
        assert widths[0.75][-1] < 5
    for threshold in (0.75, 1.0):
        assert found[threshold].items.tolist() == found[0.0].items.tolist()
        torch.testing.assert_close(found[threshold].scores, found[0.0].scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["only", "categories", "all"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_lists_and_categories_equal_the_mask_they_stand_for(model, kind, scoring):
    sequences = random_catalogue(8, 50, 4, 4)
    trie, inputs = CatalogueTrie.from_codec(codec_of(sequences)), toy_inputs()
    generator = torch.Generator().manual_seed(3)
    only = torch.randint(-1, 50, (3, 20), generator=generator)
    categories = 2 ** torch.randint(0, 64, (50,), generator=generator) | 2 ** torch.randint(
        0, 4, (50,), generator=generator
    )
    wanted = torch.tensor([0b1010, -(2**63) | 1, 0b1010])
    arguments, mask = {}, torch.ones(3, 50, dtype=torch.bool)
    if kind != "categories":
        arguments["only"] = only
        mask &= (only[:, :, None] == torch.arange(50)).any(1)
    if kind != "only":
        arguments |= {"categories": categories, "wanted": wanted}
        mask &= (categories & wanted[:, None]) != 0
    if kind == "all":
        arguments["exclude"] = only[:, :3]
        mask &= ~(only[:, :3, None] == torch.arange(50)).any(1)
    found = beam_search(model, inputs, trie, 5, 5, scoring, **arguments)
    expected = beam_search(model, inputs, trie, 5, 5, scoring, mask)
    assert found.items.tolist() == expected.items.tolist()
    assert (found.items >= 0).any()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_few_beams_do_not_depend_on_batch_blocks_or_k(model, monkeypatch, scoring):
    sequences = random_catalogue(8, 60, 5, 6)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    expected = beam_search(model, toy_inputs(), trie, 6, 6, scoring)
    fewer = beam_search(model, toy_inputs(), trie, 6, 2, scoring)  # a smaller k may stop earlier
    assert fewer.items.tolist() == expected.items[:, :2].tolist()
    changes = [("_MAX_CANDIDATES", 20), ("_sync_is_free", lambda _: False), ("runs_as_kernel", lambda *_: True)]
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


@pytest.mark.parametrize("cost", [0, 1e9])  # a dot product for each, one matrix product
@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma2", "Cohere", "Granite", "Bloom"])
def test_rows_of_the_lm_head_equal_its_product(monkeypatch, family, cost):
    monkeypatch.setattr(flr.decode.scoring, "_GATHER_COST", {"cpu": cost})
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    extra = {
        "Cohere": {"logit_scale": 0.3},
        "Granite": {"logits_scaling": 3.0},
        "Gemma2": {"final_logit_softcapping": 2.0},
    }
    if family != "Bloom":
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**sizes, **extra.get(family, {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()  # the bias too
        states, _, rows, _ = flr.decode.session.start(model, toy_inputs(), 1, want_hidden=True)
        expected = flr.decode.session.start(model, toy_inputs(), 1).states
    assert states.shape == (3, 32)
    row, token = torch.cartesian_prod(torch.arange(3), torch.arange(VOCAB)).T
    with torch.no_grad():
        torch.testing.assert_close(rows(states, row, token).view(3, -1), expected, atol=1e-5, rtol=1e-5)


def test_an_lm_head_that_is_no_plain_matrix_gives_all_logits(caplog):
    flr.decode.session._log_once.cache_clear()
    model, plain = toy_model("llama"), toy_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    trie, inputs = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 40))), toy_inputs()
    for search in (beam_search, lambda *a: (score_all_items(*a[:3], a[-1]),)):
        for ours, theirs in zip(*(search(m, inputs, trie, 5, 5, "catalogue") for m in (model, plain)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert [r.message for r in caplog.records if "lm_head" in r.message] == [
        "logits of the whole vocabulary are computed: the lm_head's rows cannot be used one by one"
    ]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normaliser(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 100_003, generator=generator).mul_(5).to(dtype)
    logits[0, 0, 7], logits[0, 1, :-1], logits[0, 2] = 1e4, -torch.inf, logits[0, 2] - 1e4
    logits[1, 0, :64] = -1e9  # as models forbid tokens
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
    assert trie.max_token < VOCAB
