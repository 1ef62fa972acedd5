"""The definition of ``flr_kernels.trie_advance`` against plain Python, and what it refuses."""

import pytest
import torch

import flr_kernels
from flr.decode.session import slots
from tests.helpers.trie_levels import advance_call, advance_case, naive_advance


@pytest.mark.parametrize("kind", ["none", "prefix", "only", "exclude"])
@pytest.mark.parametrize(
    ("items", "beams", "depth", "spread", "room"),
    [(12, 4, 1, 9, 4), (30, 8, 2, 4, 3), (30, 8, 2, 4, 1), (4, 1, 0, 4, 0), (9, 3, 1, 3, 5)],
)
def test_definition(items, beams, depth, spread, room, kind):
    made = advance_case(items + depth, 3, items, beams, depth, spread, kind, room=room)
    found = flr_kernels.trie_advance(**advance_call(made))
    for user in range(3):
        wanted = naive_advance(made, user)
        for name in ("node", "depth", "lengths", "sees"):
            assert getattr(found, name)[user].tolist() == wanted[name], name
        read = len(wanted["tokens"])  # the others are padding
        for name in ("tokens", "positions", "seen"):
            assert getattr(found, name)[user, :read].tolist() == wanted[name], name
        assert bool(found.overflow[user]) == wanted["overflow"][0]
        rows = [min(sum(wanted["lengths"][: h + 1]), made["columns"]) - 1 for h in range(len(wanted["lengths"]))]
        for h, length in enumerate(wanted["lengths"]):
            if length and made["columns"]:
                assert found.last[user, h] == user * made["columns"] + rows[h]
    width = made["columns"]
    padding = slots(found.lengths, width)[1] < 0 if width else torch.zeros(3, 0, dtype=torch.bool)
    own = found.seen[..., -width:] if width else found.seen
    assert own.diagonal(dim1=1, dim2=2)[padding].all()  # softmax over nothing would be NaN
    assert ((found.tokens >= 0) & (found.tokens <= made["trie"].max_token)).all()
    before = made["depth"].gather(1, made["parent"])
    for user, row in enumerate(padding):
        first = {int(made["position"][user] + depth) for depth in before[user]}
        assert set(found.positions[user][row].tolist()) <= first  # within what the model has positions for


def test_a_token_each():
    made = advance_case(5, 3, 30, 6, 2, 4, ways=False)
    made["depth"] = torch.tensor([1, 4, 2, 3]).expand(3, -1)  # by parent
    found = flr_kernels.trie_advance(**advance_call(made))
    for user in range(3):
        wanted = naive_advance(made, user)
        for name in ("node", "depth", "lengths", "tokens", "positions", "sees", "seen"):
            assert getattr(found, name)[user].tolist() == wanted[name], name
    assert found.overflow.tolist() == made["overflow"].tolist()
    assert found.last.tolist() == torch.arange(3 * made["columns"]).view(3, -1).tolist()


@pytest.mark.parametrize("ways", [False, True])
def test_hypotheses_that_are_none_read_some_token(ways):
    """The step before leaves them at the root, which has none."""
    made = advance_case(5, 3, 30, 6, 2, 4, ways=ways)
    made["score"][:, -1], made["node"][:, -1] = -torch.inf, 0
    found = flr_kernels.trie_advance(**advance_call(made))
    assert ((found.tokens >= 0) & (found.tokens <= made["trie"].max_token)).all()
    assert found.lengths[:, -1].tolist() == [0 if ways else 1] * 3


@pytest.mark.parametrize("ways", [False, True])
def test_registered(ways):
    given = advance_call(advance_case(2, 2, 20, 3, 1, 5, "prefix", ways=ways))
    order = ("score", "node", "parent", "sees", "depth", "position", "overflow", "tokens", "leaf_begin", "leaf_end",
             "lengths", "keys", "listed", "offset")  # fmt: skip
    values = [given.get(name) for name in order]
    rest = given.get("entries", 0), given["columns"], given.get("deepest", 0), given.get("filter", "none")
    torch.library.opcheck(torch.ops.flr.trie_advance.default, (*values, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.zeros(2, 3, dtype=torch.float64)}, "score: expected dtype torch.float32"),
        ({"parent": torch.zeros(2, 9, dtype=torch.int64)}, r"parent: expected \[B, w\] of node"),
        ({"sees": torch.zeros(3, 4, 5, dtype=torch.bool)}, r"depth: expected \[B, v\] of sees"),
        ({"position": torch.zeros(5, dtype=torch.int64)}, "position: expected B of node"),
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, "leaf_begin: expected length by M of tokens"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, "keys: expected M of tokens"),
        ({"keys": None}, "columns: expected w of node without keys"),
        ({"filter": "some"}, "filter: expected one of"),
        ({"columns": -1}, "columns: expected an integer from 0"),
        ({"deepest": True}, "deepest: expected an integer from 0"),
    ],
)
def test_bad_input_is_named(change, message):
    given = advance_call(advance_case(2, 2, 20, 3, 1, 5, "prefix")) | change
    with pytest.raises(ValueError, match=message):
        flr_kernels.trie_advance(**given)
