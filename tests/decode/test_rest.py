"""Ends of items, read in one forward from the end of any level; of fixed size, as CUDA graphs replay them."""

from __future__ import annotations

import itertools

import pytest
import torch

import flr.decode.beam
from flr.decode import CatalogueTrie, beam_search, graphs
from flr.decode import replayed as replayed_search
from flr.decode.rest import read_rest
from flr.decode.search import BeamResult
from flr.model.backbone import fixed_shapes
from tests.helpers.catalogues import LONG, codec_of
from tests.helpers.inputs import filters, toy_inputs
from tests.helpers.models import toy_model
from tests.helpers.waits import HostWaits


@pytest.mark.parametrize("kind", ["none", "mask", "exclude"])
@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_the_rest_is_read_in_one_forward(kind, depth, monkeypatch):
    """From the end of any level; where single items are left, it takes a forward and no level more."""
    model = toy_model("llama")
    sequences = [(30 + a, 40 + b, *range(10, 10 + 3 + a + b)) for a in range(4) for b in range(3)]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    chosen = filters(kind, 3, len(sequences))
    expected = beam_search(model, toy_inputs((9, 4, 6)), trie, 6, 6, **chosen)
    steps = []

    def run(_, search, prompts, __):
        replayed = graphs.Replayed(search, prompts)
        for state, _ in itertools.islice(replayed.steps(), depth):
            ended = replayed.ended(state)
        longest = int(ended.numbers[1])
        if depth >= 2 and kind == "none":  # the first two tokens tell items apart
            assert depth < longest <= max(map(len, sequences))
        assert depth >= 2 or longest > trie.depth
        session = replayed.session
        step = session.step
        session.step = lambda *args, **more: steps.append(more) or step(*args, **more)
        best = replayed.finish(ended, depth).best
        return BeamResult(*(x[:3] for x in best))

    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "run", run)
    found = beam_search(model, toy_inputs((9, 4, 6)), trie, 6, 6, **chosen)
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-5)
    assert len(steps) <= (1 if depth >= 2 else 2)


@pytest.mark.parametrize("kind", ["none", "mask", "exclude"])
@pytest.mark.parametrize(("more", "columns"), [(0, 0), (3, 0), (5, 40)])
def test_ends_of_fixed_size_are_those_of_growing_ones(kind, more, columns, monkeypatch):
    """Whatever room there is for tokens, without a wait; too little of it is noticed."""
    trie = CatalogueTrie.from_codec(codec_of(LONG))
    chosen = filters(kind, 3, len(LONG))
    model = toy_model("llama")
    expected = beam_search(model, toy_inputs((9, 4, 6)), trie, 8, 8, **chosen)

    def run(_, search, prompts, __):
        replayed = graphs.Replayed(search, prompts)
        for state, _ in itertools.islice(replayed.steps(), 2):
            ended = replayed.ended(state)
        longest, tokens = ended.numbers[1:].tolist()
        assert longest - 2 <= tokens <= 8 * (longest - 2)
        few = read_rest(search, replayed._state(ended), replayed.session, (2, longest - 2, tokens - 1))
        assert few.overflow.any()
        state = replayed._state(ended)
        with fixed_shapes(), HostWaits() as waits:
            made = read_rest(search, state, replayed.session, (2, longest - 2 + more, tokens + columns))
        assert waits.found == {}
        assert not made.overflow.any()
        return BeamResult(*(x[:3] for x in made.best))

    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "run", run)
    found = beam_search(model, toy_inputs((9, 4, 6)), trie, 8, 8, **chosen)
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("fault", [False, True])
def test_ends_are_captured_the_second_time_and_compared(fault, monkeypatch, caplog):
    """Levels and ends that run again in place of graphs, for the same prompts."""
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs.Replayed, "record", lambda self, function: (function(), function)[1])
    read = replayed_search.read_rest

    def faulty(*args):
        state = read(*args)
        state.best.items.add_(1)
        return state

    if fault:
        monkeypatch.setattr(replayed_search, "read_rest", faulty)
    kept = []

    def run(_, search, prompts, __):
        if not kept:
            kept.append(graphs.Replayed(search, prompts))
            for state, _ in itertools.islice(kept[0].steps(), 2):
                kept.append(kept[0].ended(state))
        best = kept[0]._rest(kept[2], 2, *kept[2].numbers[1:].tolist()).best
        return BeamResult(*(x[:3] for x in best))

    model, trie = toy_model("llama"), CatalogueTrie.from_codec(codec_of(LONG))
    expected = beam_search(model, toy_inputs((9, 4, 6)), trie, 8, 8)
    monkeypatch.setattr(graphs, "run", run)
    finished = []
    finish = graphs.Replayed.finish
    monkeypatch.setattr(graphs.Replayed, "finish", lambda *args: finished.append(0) or finish(*args))
    for _ in range(4):
        found = beam_search(model, toy_inputs((9, 4, 6)), trie, 8, 8)
        assert found.items.tolist() == expected.items.tolist()
    assert len(finished) == (4 if fault else 2)
    assert caplog.text.count("ends of items without CUDA graphs") == int(fault)
