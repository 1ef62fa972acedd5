"""Items of one token, ranked by one forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flr.decode import CatalogueTrie, beam_search, rank_one_token, score_all_items
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.comparisons import assert_ranked
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import FAMILIES, VOCAB, toy_model
from tests.helpers.naive import naive_scores


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_items(family):
    model, inputs = toy_model(family), toy_inputs()
    sequences = [(int(t),) for t in np.random.default_rng(0).permutation(VOCAB)[:30]]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    allowed = torch.arange(30) % 3 != 0
    for scoring in ("full", "catalogue"):
        expected = naive_scores(model, inputs, sequences, scoring, allowed)
        found = rank_one_token(model, inputs, trie, scoring, allowed)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(score_all_items(model, inputs, trie, scoring, allowed=allowed), found)
        assert_ranked(beam_search(model, inputs, trie, 3, 12, scoring, allowed), expected, 12)


def test_one_token_items_need_one_forward():
    model, inputs = toy_model("llama"), toy_inputs()
    trie = CatalogueTrie.from_sequences([12, 13, 14], [0, 1, 2, 3])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    beam_search(model, inputs, trie, 5, 5)
    rank_one_token(model, inputs, trie)
    score_all_items(model, inputs, trie)
    assert len(calls) == 3


def blocks_of(sequences, chunk):
    """Inner nodes of each block: items in their order, as many as have at most ``chunk`` together, at least one."""
    found, nodes = [], set()
    for sequence in sorted(sequences):
        own = {sequence[:length] for length in range(1, len(sequence))}
        if nodes and len(nodes | own) > chunk:
            found.append(len(nodes))
            nodes = set()
        nodes |= own
    return [*found, len(nodes)]


@pytest.mark.parametrize("chunk", [1, 3, 5, 11, 100])
def test_a_forward_reads_as_many_nodes_as_a_block_may_have(chunk):
    model, inputs, sequences = toy_model("llama"), toy_inputs(), random_catalogue(3, 40, 5, 3)
    trie, columns = CatalogueTrie.from_codec(codec_of(sequences)), []
    model.register_forward_pre_hook(lambda m, a, k: columns.append(k["input_ids"].shape[1]), with_kwargs=True)
    scores = score_all_items(model, inputs, trie, chunk=chunk)
    assert columns[1:] == blocks_of(sequences, chunk)
    torch.testing.assert_close(scores, score_all_items(model, inputs, trie), atol=1e-5, rtol=1e-5)
