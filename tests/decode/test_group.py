"""Ranks of the members of a group behind one prompt."""

import numpy as np
import pytest
import torch

from flr.decode import CatalogueTrie, beam_search
from flr.decode.group import group_ranks
from tests.helpers.inputs import group_case


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi", "mistral"])
def test_group_ranks_of_families(family, scoring):
    """Items of one to five tokens behind prompts of different lengths: members finish at different steps."""
    model, prompts, group = group_case(family, thoughts=2)
    generator = np.random.default_rng(0)
    items = {tuple(generator.integers(3, 9, n)) for n in generator.integers(1, 5, 60)}
    items = [(*item, 9) for item in sorted(items)]  # none begins another
    trie = CatalogueTrie.from_sequences(np.concatenate(items), np.cumsum([0, *map(len, items)]))
    group.decodable = True
    out = model(**prompts, group=group)
    if family == "mistral":  # its window is shorter than prompt, thoughts and item
        assert group_ranks(model, out.prompts, trie, torch.zeros(3).long(), 15, scoring) is None
        return
    rows = {name: x.repeat_interleave(4, 0) for name, x in prompts.items()}
    rows["thoughts"] = out.thoughts.flatten(0, 1)
    lists = beam_search(model, rows, trie, 15, 15, scoring).items.view(3, 4, 15)
    for member, place in [(0, 0), (1, 4), (2, 9), (3, 14)]:
        targets = lists[:, member, place]
        ranks = group_ranks(model, out.prompts, trie, targets, 15, scoring)
        hits = lists == targets[:, None, None]
        assert torch.equal(ranks, (hits * torch.arange(1, 16)).amax(-1))
        assert (ranks[:, member] == place + 1).all()
