"""Ranks of the members of a group behind one prompt."""

import numpy as np
import pytest
import torch

import flr.decode.search
from flr.decode import CatalogueTrie, beam_search, rank_one_token
from flr.decode.group import group_ranks
from flr.decode.scoring import rank_by_scores
from tests.helpers.inputs import group_case


def decodable(family, **options):
    """A model, the prompts as rows for each of four members, with its thought, and the group's prompts."""
    model, prompts, group = group_case(family, thoughts=2, **options)
    group.decodable = True
    out = model(**prompts, group=group)
    rows = {name: x.repeat_interleave(4, 0) for name, x in prompts.items()}
    return model, {**rows, "thoughts": out.thoughts.flatten(0, 1)}, out.prompts


def titles():
    """Sixty sequences of two to five tokens, none of which begins another, as ``from_sequences`` takes them."""
    generator = np.random.default_rng(0)
    items = {tuple(generator.integers(3, 9, n)) for n in generator.integers(1, 5, 60)}
    items = [(*item, 9) for item in sorted(items)]
    return np.concatenate(items), np.cumsum([0, *map(len, items)])


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi", "mistral"])
def test_group_ranks_of_families(family, scoring):
    """Items of one to five tokens behind prompts of different lengths: members finish at different steps."""
    model, rows, group = decodable(family)
    trie = CatalogueTrie.from_sequences(*titles())
    if family == "mistral":  # its window is shorter than prompt, thoughts and item
        assert group_ranks(model, group, trie, torch.zeros(3).long(), 15, scoring) is None
        return
    lists = beam_search(model, rows, trie, 15, 15, scoring).items.view(3, 4, 15)
    for member, place in [(0, 0), (1, 4), (2, 9), (3, 14)]:
        targets = lists[:, member, place]
        ranks = group_ranks(model, group, trie, targets, 15, scoring)
        hits = lists == targets[:, None, None]
        assert torch.equal(ranks, (hits * torch.arange(1, 16)).amax(-1))
        assert (ranks[:, member] == place + 1).all()


@pytest.mark.parametrize("num_beams", [2, 5])
def test_members_that_leave_one_after_the_other_keep_their_places(num_beams, monkeypatch):
    monkeypatch.setattr(flr.decode.search, "_LEAVE_BELOW", 1.0)
    model, rows, group = decodable("qwen2")
    trie = CatalogueTrie.from_sequences(*titles())
    lists = beam_search(model, rows, trie, num_beams, num_beams).items.view(3, 4, num_beams)
    for member in range(4):
        targets = lists[:, member, -1]
        hits = lists == targets[:, None, None]
        expected = (hits * torch.arange(1, num_beams + 1)).amax(-1)
        assert torch.equal(group_ranks(model, group, trie, targets, num_beams), expected)


def test_items_of_one_token_are_ranked_exactly():
    model, rows, group = decodable("qwen2")
    trie = CatalogueTrie.from_sequences(np.random.default_rng(1).permutation(np.arange(3, 40)), np.arange(38))
    targets = torch.tensor([5, 0, 36])
    expected = rank_by_scores(rank_one_token(model, rows, trie), targets.repeat_interleave(4)).view(3, 4)
    assert torch.equal(group_ranks(model, group, trie, targets, 1), expected)
    assert len(expected.unique()) > 3
    with torch.no_grad():
        model.lm_head.weight[7] = torch.inf  # of one item
    with pytest.raises(FloatingPointError):
        group_ranks(model, group, trie, targets, 1)
    with pytest.raises(ValueError, match="num_beams: expected an integer >= 1, got 0"):
        group_ranks(model, group, trie, targets, 0)


def test_members_are_packed_where_prompt_thoughts_and_item_fit_the_window():
    model, _, group = decodable("qwen2")
    trie = CatalogueTrie.from_sequences(*titles())
    longest = group.attention_mask.shape[1] + 2 + trie.depth
    for window, packed in ((longest, True), (longest - 1, False)):
        model.config.attention_chunk_size = window
        assert (group_ranks(model, group, trie, torch.zeros(3).long(), 2) is not None) == packed
