"""What a model reads between two steps of a beam search in a catalogue trie, and who may look at what.

Hypotheses of a user are tokens of one row (``flr.decode.packed``): each sees the tokens of its ancestors and its own.
Without ``keys`` a hypothesis reads the token that was chosen for it. With them it reads on to its next branching, the
deepest node above all allowed items below it, tokens of all hypotheses side by side:

    hypothesis h reads the tokens of depths d_h + 1 .. b_h, d_h of its ancestor's tokens, b_h of its branching
    its columns are Σ_{i<h} (b_i - d_i) .. + b_h - d_h - 1;  column c sees what h sees before, and h's columns up to c
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch
from ...backends import triton_config
from ..trie_step.op import MAX_WIDTH, check_filter, check_nodes
from . import reference


class Advance(NamedTuple):
    """What is read, in n columns of a user's row, and where hypotheses are after it."""

    node: Tensor  # int64 [B, w], the branching, or as it was
    depth: Tensor  # int64 [B, w], tokens after it
    lengths: Tensor  # int64 [B, w], tokens read
    last: Tensor  # int64 [B, w], row of [B · n] with the last token of each; of no meaning where the length is 0
    overflow: Tensor  # bool [B], as it was, or true where more than n are to be read
    tokens: Tensor  # int64 [B, n]; those past the end are some token, at a hypothesis' first position
    positions: Tensor  # int64 [B, n]
    sees: Tensor  # bool [B, w, c + n], columns that the next tokens of a hypothesis may look at
    seen: Tensor  # bool [B, n, c + n], columns that each of these tokens may look at


def _takes(score: Tensor, node: Tensor, *_: Any) -> None:
    triton_config.check_device(node)
    if node.shape[1] > MAX_WIDTH:
        raise ValueError(f"node: the triton backend takes at most {MAX_WIDTH} hypotheses, got {node.shape[1]}")


_OP = dispatch.op("trie_advance")
_OP.register("reference", reference.trie_advance)
_OP.register("triton", dispatch.on_use(f"{__package__}.triton_kernels", "forward"), check=_takes)


@dispatch.forward_op("trie_advance")
def _forward(
    score: Tensor, node: Tensor, parent: Tensor, sees: Tensor, depth: Tensor, position: Tensor, overflow: Tensor,
    tokens: Tensor, leaf_begin: Tensor, leaf_end: Tensor, lengths: Tensor, keys: Tensor | None, listed: Tensor | None,
    offset: Tensor | None, entries: int, columns: int, deepest: int, filter: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    users, count = node.shape
    behind = sees.shape[-1] + columns
    flat = [node.new_empty((users, size)) for size in (count, count, count, count, columns, columns)]
    rows = [sees.new_empty((users, size, behind)) for size in (count, 0 if keys is None else columns)]
    return *flat[:4], overflow.new_empty(overflow.shape), *flat[4:], *rows  # type: ignore[return-value]


def _check_hypotheses(
    score: Tensor, node: Tensor, parent: Tensor, sees: Tensor, depth: Tensor, position: Tensor, overflow: Tensor
) -> None:
    checks.tensor("node", node, "B w", dtypes=(torch.int64,))
    if node.shape[1] < 1:
        raise ValueError(f"node: expected w >= 1, got {tuple(node.shape)}")
    for name, x, dtype in (("score", score, torch.float32), ("parent", parent, torch.int64)):
        checks.tensor(name, x, "B w", dtypes=(dtype,), beside=("node", node))
        checks.same(name, tuple(x.shape), tuple(node.shape), "[B, w] of node")
    checks.tensor("sees", sees, "B v c", dtypes=(torch.bool,), beside=("node", node))
    checks.tensor("depth", depth, "B v", dtypes=(torch.int64,), beside=("node", node))
    checks.same("depth", tuple(depth.shape), tuple(sees.shape[:2]), "[B, v] of sees")
    for name, x, dtype in (("position", position, torch.int64), ("overflow", overflow, torch.bool)):
        checks.tensor(name, x, "B", dtypes=(dtype,), beside=("node", node))
    for name, x in (("sees", sees), ("position", position), ("overflow", overflow)):
        checks.same(name, len(x), len(node), "B of node")


def _check_trie(
    node: Tensor, tokens: Tensor, leaf_begin: Tensor, leaf_end: Tensor, lengths: Tensor, keys: Tensor | None
) -> None:
    check_nodes(("node", node), "tokens", tokens=tokens, leaf_begin=leaf_begin, leaf_end=leaf_end)
    checks.tensor("lengths", lengths, "C", dtypes=(torch.int32,), beside=("node", node))
    if keys is not None:
        checks.tensor("keys", keys, "M", dtypes=(torch.int64,), beside=("node", node))
        checks.same("keys", len(keys), len(tokens), "M of tokens")


def trie_advance(
    score: Tensor,
    node: Tensor,
    parent: Tensor,
    sees: Tensor,
    depth: Tensor,
    position: Tensor,
    overflow: Tensor,
    tokens: Tensor,
    leaf_begin: Tensor,
    leaf_end: Tensor,
    lengths: Tensor,
    *,
    columns: int,
    keys: Tensor | None = None,
    deepest: int = 0,
    filter: str = "none",
    listed: Tensor | None = None,
    offset: Tensor | None = None,
    entries: int = 0,
) -> Advance:
    """What w hypotheses a user read next, behind c tokens of v earlier ones, in one launch.

    Nodes and parents are those that :func:`flr_kernels.trie_step` gave; they are not looked at again.

    Args:
        score, node, parent: [B, w], w >= 1, of :func:`flr_kernels.trie_step`; dead hypotheses read nothing with keys.
        sees: bool [B, v, c], which of the c tokens each earlier hypothesis may look at.
        depth: int64 [B, v], tokens that each of them has.
        position: int64 [B], of a first token.
        overflow: bool [B], whether there has been too little room before.
        tokens, leaf_begin, leaf_end: int32 [M], of the trie. lengths: int32 [C], tokens of the item at each leaf.
        columns: n, for as many tokens; w without keys.
        keys: int64 [M], level · (C + 1) + leaf_begin of every node, which rise; None to read a token each.
        deepest: tokens of the longest item, with keys.
        filter, listed, offset, entries: as of :func:`flr_kernels.trie_step`, with keys.

    Returns:
        :class:`Advance`. What is read is fixed by n: nothing depends on values, and nothing waits for the device.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> def ints(*x):
        ...     return torch.tensor(x, dtype=torch.int32)
        >>> tokens, begin, end, lengths = ints(-1, 5, 6), ints(0, 0, 1), ints(2, 1, 2), ints(1, 1)  # items (5,), (6,)
        >>> node, none = torch.tensor([[2, 1]]), torch.zeros(1, dtype=torch.int64)
        >>> found = trie_advance(torch.zeros(1, 2), node, node * 0, torch.zeros(1, 1, 0, dtype=torch.bool), none[None],
        ...                      none + 9, none.bool(), tokens, begin, end, lengths, columns=2)
        >>> found.tokens.tolist(), found.positions.tolist(), found.seen.tolist()
        ([[6, 5]], [[9, 9]], [[[True, False], [False, True]]])
    """
    _check_hypotheses(score, node, parent, sees, depth, position, overflow)
    _check_trie(node, tokens, leaf_begin, leaf_end, lengths, keys)
    check_filter(("node", node), filter, listed, offset, entries)
    checks.integer("columns", columns, 0, (1 << 31) - 1)
    checks.integer("deepest", deepest, 0, (1 << 31) - 1)
    if keys is None:
        checks.same("columns", columns, node.shape[1], "w of node without keys")
    given = (x.contiguous() for x in (score, node, parent, sees, depth, position, overflow))
    trie = tokens, leaf_begin, leaf_end, lengths, keys
    found = Advance(*_forward(*given, *trie, listed, offset, entries, columns, deepest, filter))
    return found if keys is not None else found._replace(seen=found.sees)
