"""Decoding by kernels: how many operations a level has beside the model, and what makes them."""

import pytest

import flr.decode.beam
import flr.decode.packed
from flr.decode import CatalogueTrie, beam_search, graphs
from flr.model.backbone import fixed_shapes
from tests.decode.test_graphs import filters
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import toy_model
from tests.helpers.operations import Operations

SEQUENCES = [(30, 31, *s) for s in random_catalogue(5, 40, 4, 4)]  # a chain at the root
#: Of a level that begins and ends with one: three kernels, the mask's columns beside each other (three more on a GPU,
#: which makes numbers of them), how far the batch is, and what the scoring needs of states.
LEVEL = {
    "full": {"trie_advance", "cat", "log_normaliser", "trie_step", "trie_collect", "amax"},
    "catalogue": {"trie_advance", "cat", "index", "trie_step", "trie_collect", "amax"},
}


@pytest.mark.parametrize("kind", ["none", "mask", "shared", "exclude", "only"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_a_level_of_a_captured_search_has_six_operations(scoring, kind, monkeypatch):
    """43 to 78 under ``full`` and 176 to 198 under ``catalogue`` before `trie_advance` and `trie_collect`."""
    levels = []

    def run(_, search, prompts, __):
        replayed = graphs.Replayed(search, prompts)
        list(replayed.steps())  # makes what is made once
        counted = Operations()
        monkeypatch.setattr(flr.decode.packed, "model_states", counted.leave_out(flr.decode.packed.model_states))
        if replayed.search.logits is not None:
            kind_of_rows = type(replayed.search.logits)
            monkeypatch.setattr(kind_of_rows, "__call__", counted.leave_out(kind_of_rows.__call__))
        with fixed_shapes(), counted:
            for state, _ in replayed.steps():
                replayed.ended(state)
                levels.append(dict(counted.found))
                counted.found.clear()

    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "run", run)
    trie = CatalogueTrie.from_codec(codec_of(SEQUENCES))
    beam_search(toy_model("llama"), toy_inputs((9, 4, 6)), trie, 5, 6, scoring, **filters(kind, 3, len(SEQUENCES)))
    wanted = {f"flr::{name}" if "_" in name else name: 1 for name in LEVEL[scoring]}
    assert len(levels) == trie.depth
    for level in levels[1:-1]:
        assert level == wanted
    assert sum(levels[0].values()) < 70
