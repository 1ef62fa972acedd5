"""Values of sets of factors: against the model run once a set, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flr.decode import item_filter, score_all_items
from flr.explain import asked, attribution
from flr.explain.asked import asked_of
from flr.explain.attribution import attribute, coalitions
from flr.explain.thinking import think
from flr.model.backbone import evaluating
from tests.helpers.models import build_recommender

HISTORIES = [np.array([3, 5, 8]), np.array([1]), np.arange(12)]


def by_definition(model, inputs, prompts, trie, scoring, exclude):
    """v float64 [A, B, C] of every set: the whole catalogue scored behind prompts that are given their thoughts."""
    sets, _ = coalitions(prompts.contributions.shape[2])
    values = []
    for chosen in torch.from_numpy(sets).to(prompts.contributions):
        thoughts = prompts.anchors + torch.einsum("k,bnkd->bnd", chosen, prompts.contributions)
        given = {**inputs, "thoughts": thoughts}
        values.append(score_all_items(model, given, trie, scoring, exclude=exclude).double().numpy())
    return np.array(values)


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize(
    ("codec", "family", "options"),
    [
        ("title", "llama", {"num_factors": 3, "num_thoughts": 2}),
        ("title", "mistral", {}),  # its window is shorter than the prompt: the cache cannot be cut
        ("sid", "gpt2", {"variant": "latentr3"}),
        ("id", "llama", {"anchor": "last"}),
    ],
)
def test_values_are_those_of_the_model_with_these_thoughts(codec, family, options, scoring, monkeypatch):
    recommender = build_recommender(codec, family, **options)
    model, trie, inputs = recommender.model, recommender.trie, recommender.processor(HISTORIES)
    exclude = torch.tensor([[3, 4], [9, -1], [30, 31]])
    items = np.array([[0, 7, 11, 29, -1], [20, 21, 22, 38, 39], [8, 1, -1, -1, -1]])
    known = np.maximum(items, 0)
    with torch.inference_mode(), evaluating(model):
        prompts = think(model, inputs, trie.depth)
        values = by_definition(model, inputs, prompts, trie, scoring, exclude)
        values = np.take_along_axis(values, known[None], 2)
        ways = [attribute(prompts, items, values[-1], trie, scoring, exclude)]
        for name, bound in (("_MAX_TOKENS", 8), ("_MAX_ROWS", 3), ("_MAX_CELLS", 50)):
            monkeypatch.setattr(attribution, name, bound)
        monkeypatch.setattr(asked, "_MAX_NODES", 4)
        ways.append(attribute(prompts, items, values[-1], trie, scoring, exclude))
    _, weights = coalitions(prompts.contributions.shape[2])
    expected = np.moveaxis(np.tensordot(weights, values, 1), 0, -1)
    assert np.abs(expected[items >= 0]).max() > 1e-2
    for base, contributions, _ in ways:
        np.testing.assert_allclose(base[items >= 0], values[0][items >= 0], atol=5e-5)
        np.testing.assert_allclose(contributions[items >= 0], expected[items >= 0], atol=5e-5)
        assert not base[items < 0].any()
        assert not contributions[items < 0].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_of_a_tree_equals_a_row_for_every_path(family):
    recommender = build_recommender("title", family, num_factors=2, num_thoughts=2)
    with torch.inference_mode(), evaluating(recommender.model):
        prompts = think(recommender.model, recommender.processor(HISTORIES), recommender.trie.depth)
        assert prompts.packs
        allows = item_filter(recommender.trie, 3)
        trees = [one.tree for one in asked_of(recommender.trie, allows, np.array([[0, 9], [5, -1], [7, 8]]), "full")]
        thoughts = prompts.anchors[:, None] + torch.randn(3, 2, *prompts.anchors.shape[1:])
        packed = prompts.states(trees, thoughts)
        prompts.packs = False
        for tree, a, b in zip(trees, packed, prompts.states(trees, thoughts), strict=True):
            torch.testing.assert_close(a[:, : 1 + len(tree)], b[:, : 1 + len(tree)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_the_prompt_is_encoded_once_and_the_full_set_not_again(scoring):
    """Tokens that the model reads for shares: those of the trie above the items, once for each set but the full one."""
    recommender = build_recommender("title", num_factors=2)
    read = []
    hook = recommender.model.base_model.register_forward_hook(
        lambda _, args, output: read.append(int(np.prod(output.last_hidden_state.shape[:2])))
    )
    arguments = {"k": 3, "num_beams": 3, "scoring": scoring}
    search = recommender.recommend([HISTORIES[0]], **arguments, shares=False)
    alone, read[:] = list(read), []
    found = recommender.recommend([HISTORIES[0]], **arguments, shares=True)
    hook.remove()
    assert [r.index for r in found[0]] == [r.index for r in search[0]]
    prefixes = {
        tuple(recommender.processor.item_codec.encode(r.index)[:size])
        for r in found[0]
        for size in range(1, len(recommender.processor.item_codec.encode(r.index)))
    }
    if scoring == "catalogue":  # up to the last branching
        trie = recommender.trie
        inner = {p for p in prefixes if len(trie.allowed_tokens(p)) > 1}
        prefixes = {p for p in prefixes if any(q[: len(p)] == p for q in inner)}
    assert read == [*alone, 3 * (1 + len(prefixes))]  # of four sets
