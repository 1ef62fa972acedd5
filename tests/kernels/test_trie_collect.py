"""The definition of ``flr_kernels.trie_collect`` against plain Python, and what it refuses."""

import math

import pytest
import torch

import flr_kernels
from tests.helpers.trie_levels import collect_call, collect_case, naive_collect


@pytest.mark.parametrize("kind", ["none", "prefix", "only", "exclude"])
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize(
    ("items", "beams", "depth", "spread", "k", "widths", "penalty"),
    [
        (40, 4, 1, 6, 4, (3, 5), 0.0),
        (30, 1, 0, 30, 6, (9, 12), 0.7),
        (20, 6, 1, 4, 1, (4, 0), -0.5),
        (9, 3, 2, 3, 3, (0, 6), 0.0),
    ],
)
def test_definition(items, beams, depth, spread, k, widths, penalty, unique, kind):
    made = collect_case(items + k, 3, items, beams, depth, spread, kind, unique, k, widths, penalty)
    found = flr_kernels.trie_collect(**collect_call(made))
    for user in range(3):
        best, going, left = naive_collect(made, user)
        assert found.items[user].tolist() == [*(item for _, item in best), *[-1] * (k - len(best))]
        scores = torch.tensor([*(score for score, _ in best), *[-math.inf] * (k - len(best))])
        torch.testing.assert_close(found.scores[user], scores)
        assert found.score[user].tolist() == going
        assert found.left[user].tolist() == left
    assert found.broken.tolist() == (made["broken"] | made["invalid"]).tolist()


def test_equal_scores_go_to_the_smaller_item():
    made = collect_case(3, 1, 20, 3, 1, 5, k=3)
    made["items"], made["scores"] = torch.tensor([[7, 2, 5]]), torch.zeros(1, 3)
    found = flr_kernels.trie_collect(**collect_call(made))
    assert found.items.tolist() == [[2, 5, 7]]


def test_registered():
    given = collect_call(collect_case(2, 2, 20, 3, 1, 5, "prefix", unique=True))
    chosen = given["unfinished"], given["all"]
    values = [given[name] for name in ("items", "scores", "broken", "invalid")]
    values += [chosen[0].score, chosen[0].node, chosen[1].score, chosen[1].node, chosen[1].key]
    order = ("children", "leaf_begin", "leaf_end", "item", "lengths", "scale", "listed", "offset", "entries", "depth",
             "longest", "unique", "filter")  # fmt: skip
    torch.library.opcheck(torch.ops.flr.trie_collect.default, (*values, *(given[name] for name in order)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": torch.zeros(2, 0, dtype=torch.int64)}, "items: expected k >= 1"),
        ({"scores": torch.zeros(2, 9)}, r"scores: expected \[B, k\] of items"),
        ({"broken": torch.zeros(5, dtype=torch.bool)}, "broken: expected B of items"),
        ({"all": torch.zeros(2)}, "all: expected Continuations, got Tensor"),
        ({"children": torch.zeros(3, dtype=torch.int32)}, "children: expected length by M of leaf_begin"),
        ({"item": torch.zeros(3, dtype=torch.int32)}, "item: expected C of lengths"),
        ({"scale": torch.zeros(9, dtype=torch.float64)}, "scale: expected dtype torch.float32"),
        ({"longest": 99}, "longest: expected an integer from 0"),
        ({"depth": -1}, "depth: expected an integer from 0"),
        ({"unique": 1}, "unique: expected True or False"),
        ({"filter": "only"}, "listed, offset: expected both"),
    ],
)
def test_bad_input_is_named(change, message):
    given = collect_call(collect_case(2, 2, 20, 3, 1, 5)) | change
    with pytest.raises(ValueError, match=message):
        flr_kernels.trie_collect(**given)


def test_selections_of_other_shapes_are_named():
    given = collect_call(collect_case(2, 2, 20, 3, 1, 5))
    wrong = given["all"]._replace(key=given["all"].key[:, :1])
    with pytest.raises(ValueError, match=r"all.key: expected B of items"):
        flr_kernels.trie_collect(**given | {"all": wrong})


def test_who_can_still_tie_goes_on():
    made = collect_case(3, 1, 20, 3, 1, 5, k=3, widths=(3, 0))
    made["items"], made["scores"] = torch.tensor([[7, 2, 5]]), torch.full((1, 3), -1.0)
    made["unfinished"] = made["unfinished"]._replace(score=torch.tensor([[-0.5, -1.0, -1.0000001]]))
    found = flr_kernels.trie_collect(**collect_call(made))
    assert (found.score != -math.inf).tolist() == [[True, True, False]]
