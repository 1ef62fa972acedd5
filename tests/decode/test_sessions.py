"""Packed and expanded sessions: naive scores in every family, whatever the padding, the window and the attention."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch
import transformers

import flr.decode.packed
import flr.decode.prompts
from flr.decode import CatalogueTrie, beam_search, score_all_items
from flr.decode.prompts import prefill
from flr.decode.session import lm_head_inputs
from flr.model.backbone import cache_of
from flr.model.head import HeadRows
from flr.model.verify import Traits
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.comparisons import assert_ranked
from tests.helpers.inputs import row_of, toy_inputs
from tests.helpers.models import FAMILIES, VOCAB, toy_model
from tests.helpers.naive import naive_scores


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize(
    ("family", "attention"),  # transformers refuses Gemma 2's softcap with sdpa
    [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")],
)
def test_all_families_equal_naive(family, attention, scoring):
    model, inputs = toy_model(family, attention), toy_inputs()
    sequences = random_catalogue(seed=3)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    expected = naive_scores(model, inputs, sequences, scoring)
    torch.testing.assert_close(score_all_items(model, inputs, trie, scoring, chunk=5), expected, atol=1e-4, rtol=1e-5)
    assert_ranked(beam_search(model, inputs, trie, num_beams=20, k=len(sequences), scoring=scoring), expected, 14)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("window", [4, 8, "one too few"])
def test_short_sliding_window_falls_back_and_is_exact(family, window, caplog):
    flr.model.backbone.warn_once.cache_clear()
    sequences = random_catalogue(seed=4)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    if window == "one too few":  # for the prompt and all tokens of an item but the last, which is not read
        window = 7 + trie.depth - 2
    model, inputs = toy_model(family, sliding_window=window), toy_inputs((7, 7, 7))
    with caplog.at_level("WARNING"):
        for scoring in ("full", "catalogue"):
            expected = naive_scores(model, inputs, sequences, scoring)
            found = score_all_items(model, inputs, trie, scoring, chunk=6)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
            assert_ranked(beam_search(model, inputs, trie, 20, 14, scoring), expected, 14)
    assert sum("attention window" in r.message for r in caplog.records) == 1


def test_models_without_position_ids_fall_back_and_are_exact(caplog):
    flr.model.backbone.warn_once.cache_clear()
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25)
    model, inputs = transformers.BloomForCausalLM(config).eval(), toy_inputs()
    sequences = random_catalogue(seed=4)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    expected = naive_scores(model, inputs, sequences)
    torch.testing.assert_close(score_all_items(model, inputs, trie, chunk=6), expected, atol=1e-4, rtol=1e-5)
    assert_ranked(beam_search(model, inputs, trie, 20, 14), expected, 14)
    assert [r.message for r in caplog.records] == [
        "decoding expands the prompt's cache to every beam instead of sharing it: "
        "BloomForCausalLM derives positions from the attention mask"
    ]


def test_attention_without_a_4d_mask_falls_back():
    model, inputs = toy_model("llama"), toy_inputs()
    past = cache_of(model(input_ids=inputs["input_ids"], use_cache=True))
    assert flr.decode.packed.obstacle(model, past, 12) is None
    model.config._attn_implementation = "flash_attention_2"
    obstacle = flr.decode.packed.obstacle(model, past, 12)
    assert obstacle == "flash_attention_2 attention takes no 4-D mask"


def without_packing(monkeypatch, kind):
    """Sessions of another kind, whatever the model can do."""
    if kind == "expanded":
        monkeypatch.setattr(flr.decode.prompts, "obstacle", lambda *_: "test")
    else:
        monkeypatch.setattr(flr.decode.prompts, "traits_of", lambda _: Traits(steps=False))


def test_what_is_packed_fits_the_smallest_window():
    model = toy_model("mistral", sliding_window=8)
    past = cache_of(model(**{name: toy_inputs()[name] for name in ("input_ids", "attention_mask")}, use_cache=True))
    assert flr.decode.packed.obstacle(model, past, 8) is None
    assert flr.decode.packed.obstacle(model, past, 9) == "prompt plus item can exceed the attention window of 8 tokens"
    model.config.attention_chunk_size = 6
    assert flr.decode.packed.obstacle(model, past, 6) is None
    assert flr.decode.packed.obstacle(model, past, 7) == "prompt plus item can exceed the attention window of 6 tokens"


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("kind", ["expanded", "recomputed"])
def test_other_sessions_equal_packed(monkeypatch, kind, scoring):
    """Users with one item and with few leave the batch before the others; hypotheses are of different depths."""
    model, inputs = toy_model("llama"), toy_inputs((7, 3, 5, 4))
    chain = [(*range(30, 33), *s) for s in random_catalogue(4, 12, 4, 2)]
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5, num_items=30) + chain))
    allowed = torch.ones(4, 42, dtype=torch.bool)
    allowed[0, 1:] = allowed[2, 3:] = False
    arguments = model, inputs, trie
    packed = [beam_search(*arguments, 5, 5, scoring, allowed), beam_search(*arguments, 5, 5, scoring)]
    scored = score_all_items(*arguments, scoring, 7, allowed)
    without_packing(monkeypatch, kind)
    other = [beam_search(*arguments, 5, 5, scoring, allowed), beam_search(*arguments, 5, 5, scoring)]
    for expected, found in zip(packed, other, strict=True):
        assert found.items.tolist() == expected.items.tolist()
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score_all_items(*arguments, scoring, 7, allowed), scored, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["packed", "expanded", "recomputed"])
def test_an_lm_head_whose_rows_cannot_be_used_gives_logits_of_the_vocabulary(monkeypatch, kind):
    model, inputs = toy_model("llama"), toy_inputs()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5)))
    expected = beam_search(model, inputs, trie, 5, 5, "catalogue")
    if kind != "packed":
        without_packing(monkeypatch, kind)
    monkeypatch.setattr(HeadRows, "of", lambda *_: None)
    assert prefill(model, inputs, trie.depth, want_hidden=True).head_rows is None
    found = beam_search(model, inputs, trie, 5, 5, "catalogue")
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_hidden_states_are_taken_from_the_own_thread_alone():
    model, states, other = toy_model("llama"), torch.randn(2, 1, 32), []
    with lm_head_inputs(model, skip=True) as seen:
        thread = threading.Thread(target=lambda: other.append(model.lm_head(states)))
        thread.start()
        thread.join()
        own = model.lm_head(2 * states)
    assert other[0].shape == (2, 1, VOCAB)
    assert own.shape == (2, 0, VOCAB)
    assert [x.tolist() for x in seen] == [(2 * states).tolist()]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "expanded", "recomputed"])
def test_a_tree_leaves_the_session_as_it_was(monkeypatch, kind):
    if kind != "packed":
        without_packing(monkeypatch, kind)
    model, inputs = toy_model("llama"), toy_inputs()
    session, fresh = (prefill(model, inputs, 4).session for _ in range(2))
    nodes = np.array([12, 13, 14]), np.array([-1, -1, 1]), np.array([1, 1, 2])
    first = session.tree(*nodes)
    torch.testing.assert_close(session.tree(*nodes), first)
    tokens, parents, lengths = torch.tensor([[12, 13, 14]] * 3), torch.zeros(3, 2).long(), torch.tensor([[1, 2]] * 3)
    after = session.step(tokens, parents, lengths)
    torch.testing.assert_close(after, fresh.step(tokens, parents, lengths))
    torch.testing.assert_close(after, first[:, [0, 2]], atol=1e-5, rtol=1e-5)


def test_a_cache_that_takes_a_token_at_a_time_is_given_one(monkeypatch):
    model, inputs, columns = toy_model("llama"), toy_inputs(), []
    trie = CatalogueTrie.from_codec(codec_of([(10, 20, 21, 5), (10, 20, 21, 6), (11, 20, 5), (11, 20, 6)]))
    expected = beam_search(model, inputs, trie, 4, 4, "catalogue")
    without_packing(monkeypatch, "expanded")
    monkeypatch.setattr(flr.decode.prompts, "traits_of", lambda _: Traits(pieces=False))
    model.register_forward_pre_hook(lambda m, a, k: columns.append(k["input_ids"].shape[1]), with_kwargs=True)
    found = beam_search(model, inputs, trie, 4, 4, "catalogue")
    assert set(columns[1:]) == {1}
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_positions_and_gaps_are_read_as_given_or_refused(monkeypatch):
    model, inputs = toy_model("llama"), toy_inputs()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5)))
    wide = {**inputs, "position_ids": inputs["position_ids"] * 2}
    gap = {name: inputs[name].clone() for name in ("input_ids", "attention_mask")}
    gap["attention_mask"][0, 2] = 0
    scores = [score_all_items(model, given, trie) for given in (inputs, wide, gap)]
    assert not any(torch.allclose(scores[0][0], other[0], atol=0.1) for other in scores[1:])
    with monkeypatch.context() as patch:
        without_packing(patch, "expanded")
        for given, expected in zip((inputs, wide, gap), scores, strict=True):
            torch.testing.assert_close(score_all_items(model, given, trie), expected, atol=1e-5, rtol=1e-5)
    without_packing(monkeypatch, "recomputed")
    padding = {**inputs, "position_ids": inputs["position_ids"].masked_fill(inputs["attention_mask"] == 0, 1)}
    torch.testing.assert_close(score_all_items(model, padding, trie), scores[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="position_ids: expected 0, 1, 2, … where prompts are encoded anew"):
        beam_search(model, wide, trie)
    with pytest.raises(ValueError, match="attention_mask: expected padding before the prompt alone"):
        beam_search(model, gap, trie)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batch_do_not_matter(family):
    model = toy_model(family)
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=6, num_items=40)))
    together = beam_search(model, toy_inputs(), trie, 6, 6)
    wide = toy_inputs(pad_to=20)
    del wide["position_ids"]  # counted from the first token that is seen
    padded = beam_search(model, wide, trie, 6, 6)
    assert together.items.tolist() == padded.items.tolist()
    torch.testing.assert_close(together.scores, padded.scores, atol=1e-5, rtol=1e-5)
    inputs = toy_inputs()
    for row in range(3):
        alone = {"input_ids": row_of(inputs, row)[None]}
        single = beam_search(model, alone, trie, 6, 6)
        assert single.items[0].tolist() == together.items[row].tolist()
        torch.testing.assert_close(single.scores[0], together.scores[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            score_all_items(model, alone, trie)[0], score_all_items(model, inputs, trie)[row], atol=1e-5, rtol=1e-5
        )


def test_attention_of_packed_beams_is_pinned_on_a_device(monkeypatch):
    """Where it is pinned, and to what: the flags are PyTorch's and can be read without a device."""
    inside, seen = [], []

    @contextlib.contextmanager
    def noting(device):
        inside.append(device.type)
        with pinned(torch.device("cuda")):
            yield
        inside.pop()

    def look(*_):
        cuda = torch.backends.cuda
        names = (cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.flash_sdp_enabled, cuda.cudnn_sdp_enabled)
        seen.append((list(inside), [enabled() for enabled in names]))

    pinned = flr.decode.packed.pinned_attention
    monkeypatch.setattr(flr.decode.packed, "pinned_attention", noting)
    model = toy_model("qwen2", "sdpa")
    model.model.layers[0].self_attn.register_forward_pre_hook(look)
    sequences = random_catalogue(seed=3)
    before = torch.backends.cuda.flash_sdp_enabled()
    beam_search(model, toy_inputs(), CatalogueTrie.from_codec(codec_of(sequences)), num_beams=4, k=4)
    pinned_calls = [flags for where, flags in seen if where == ["cpu"]]
    assert pinned_calls  # the steps behind the prompt
    assert all(flags == [True, True, False, False] for flags in pinned_calls)
    assert [] in [where for where, _ in seen]  # the prompt itself
    assert torch.backends.cuda.flash_sdp_enabled() == before
