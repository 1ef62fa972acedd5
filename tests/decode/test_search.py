"""How a search spends its work: forwards, rows of the lm_head, users that finish, blocks of candidates."""

from __future__ import annotations

import functools

import pytest
import torch

import flr.decode.beam
import flr.decode.prompts
import flr.decode.search
from flr.decode import CatalogueTrie, beam_search, score_all_items
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.comparisons import assert_ranked
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import VOCAB


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
    assert forwards == [(3, 7), (3, 15), (3, 1)]  # every hypothesis of a user to its next choice; the last choice
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
        monkeypatch.setattr(flr.decode.prompts, "obstacle", lambda *_: "test")
    sequences = random_catalogue(8, 60, 5, 4)
    trie, inputs = CatalogueTrie.from_codec(codec_of(sequences)), toy_inputs((5, 9, 4, 7, 3))
    shallow = [i for i, s in enumerate(sequences) if len(s) <= 3]
    allowed = torch.ones(5, 60, dtype=torch.bool)
    for row in (0, 3):
        allowed[row] = False
        allowed[row, shallow] = True
    found, widths = {}, {}
    for threshold in (0.0, 0.75, 1.0):
        monkeypatch.setattr(flr.decode.search, "_LEAVE_BELOW", threshold)
        call = functools.partial(beam_search, model, inputs, trie, 6, 6, scoring, allowed)
        forwards, _ = count_work(model, lambda call=call, at=threshold: found.update({at: call()}))
        widths[threshold] = [users for users, _ in forwards[1:]]
    if session == "packed":
        assert set(widths[0.0]) == {5}
        assert widths[0.75][-1] < 5
    for threshold in (0.75, 1.0):
        assert found[threshold].items.tolist() == found[0.0].items.tolist()
        torch.testing.assert_close(found[threshold].scores, found[0.0].scores, atol=1e-5, rtol=1e-5)


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
            patch.setattr(flr.decode.beam if name == "runs_as_kernel" else flr.decode.search, name, value)
            other = beam_search(model, toy_inputs(), trie, 6, 6, scoring)
        assert other.items.tolist() == expected.items.tolist()
        torch.testing.assert_close(other.scores, expected.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["packed", "kernel", "expanded"])
def test_users_that_choose_at_the_root_do_not_wait_for_those_that_read_a_chain_first(model, monkeypatch, kind):
    """The second user's allowed items begin with a chain, the others' with a choice."""
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: kind == "kernel")
    if kind == "expanded":
        monkeypatch.setattr(flr.decode.prompts, "obstacle", lambda *_: "test")
    trie = CatalogueTrie.from_codec(codec_of([(10, 11, 12, 5), (10, 11, 12, 6), (20, 5), (20, 6), (21, 5)]))
    allowed = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    found = beam_search(model, toy_inputs(), trie, 5, 5, "catalogue", allowed)
    assert_ranked(found, score_all_items(model, toy_inputs(), trie, "catalogue", allowed=allowed), 5)


def test_catalogue_scoring_stops_at_unique_prefixes(model):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    trie = CatalogueTrie.from_codec(codec_of([(10, *range(20, 50)), (11, *range(20, 50)), (12, 13)]))
    found = beam_search(model, toy_inputs(), trie, 5, 3, "catalogue")
    handle.remove()
    assert len(calls) == 1
    assert sorted(found.items[0].tolist()) == [0, 1, 2]
