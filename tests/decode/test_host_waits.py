"""Decoding on a device: where the host waits for it, by counting, on the CPU with the ways of another device."""

import linecache
from pathlib import Path

import pytest
import torch

import flr.decode.beam
import flr.decode.search
from flr.decode import CatalogueTrie, beam_search, graphs
from flr.model.backbone import fixed_shapes
from flr.model.shared_prompt import shared_prompts
from tests.decode.test_graphs import filters
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import toy_model
from tests.helpers.waits import HostWaits

ROOT = Path(__file__).parents[2]
LENGTHS = (9, 4, 6)
SEQUENCES = [(30, 31, *s) for s in random_catalogue(5, 40, 4, 4)]  # a chain at the root


@pytest.fixture(autouse=True)
def _ways_of_a_device(monkeypatch):
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(flr.decode.search, "_sync_is_free", lambda _: False)


def search(family, scoring, kind):
    trie = CatalogueTrie.from_codec(codec_of(SEQUENCES))
    arguments = filters(kind, len(LENGTHS), len(SEQUENCES))
    return beam_search(toy_model(family), toy_inputs(LENGTHS), trie, 5, 6, scoring, **arguments)


@pytest.mark.parametrize("kind", ["none", "mask", "shared", "exclude", "only"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "mistral"])
def test_none_at_any_level_of_a_search_of_fixed_shapes(family, scoring, kind, monkeypatch):
    levels, found = [], {}

    def run(_, search, prompts, __):
        replayed = graphs.Replayed(search, prompts)
        with fixed_shapes(), HostWaits() as waits:
            for state, more in replayed.steps():
                replayed.ended(state)
                levels.append(more)
        found.update(waits.found)

    monkeypatch.setattr(graphs, "run", run)
    search(family, scoring, kind)
    depth = max(map(len, SEQUENCES))
    assert len(levels) == depth
    assert levels == [True] * (depth - 1) + [False]
    assert found == {}


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_none_where_beams_attend_to_the_prompt_apart(scoring, monkeypatch):
    """The fourth user of the fixed shapes has no prompt at all."""
    expected, found, results = search("llama", scoring, "none"), {}, []

    def run(_, search, prompts, __):
        assert prompts.session.shares
        replayed = graphs.Replayed(search, prompts)
        assert len(replayed.live) == 4
        with fixed_shapes(), HostWaits() as waits:
            for state, _ in replayed.steps():
                best = state.best
        found.update(waits.found)
        results.append(best)

    monkeypatch.setattr(graphs, "run", run)
    with shared_prompts(True):
        search("llama", scoring, "none")
    assert found == {}
    assert results[0].items[: len(LENGTHS)].tolist() == expected.items.tolist()
    torch.testing.assert_close(results[0].scores[: len(LENGTHS)], expected.scores, atol=1e-5, rtol=1e-5)


#: What waits in a search of growing shapes, by its line, with the reason. On a device the watch asks events instead.
WAITS = {
    "full": {"if bool(broken | state.broken.any()):": 1},  # once, at the end: whether logits were finite
    "catalogue": {
        "if bool(broken | state.broken.any()):": 1,
        "known = numbers.tolist() if host_knows else watch.ask(numbers)": 5,  # a level's tokens shape its forward
        "unfinished = (state.running.score != -torch.inf).any(1).nonzero()[:, 0]": 1,  # users leave, known from above
    },
}


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_waits_of_a_search_without_graphs(scoring, monkeypatch):
    found = {}
    run = flr.decode.search.Search.run

    def counted(self, prompts):
        with fixed_shapes(), HostWaits() as waits:
            result = run(self, prompts)
        found.update({place: count for (_, place), count in waits.found.items() if "decode/watch.py" not in place})
        return result

    monkeypatch.setattr(graphs, "run", lambda *_: None)
    monkeypatch.setattr(flr.decode.search.Search, "run", counted)
    search("llama", scoring, "none")
    lines = {}
    for place, count in found.items():
        path, number = place.split(":")
        lines[linecache.getline(str(ROOT / path), int(number)).strip()] = count
    assert lines == WAITS[scoring]
