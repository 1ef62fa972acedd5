"""What a step of beam search in a catalogue trie leaves behind: the best items so far, and who can still enter them.

A continuation that ends an item of n tokens with log-probability s has the score s / scale[n]. It is an item where its
node is a leaf, or with ``unique`` where one allowed item is below. An unfinished one with log-probability s goes on
unless s / scale[longest] is below the k-th best score: no descendant's can be larger. Equal scores: the smaller item.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch
from ...backends import triton_config
from ..trie_step.op import MAX_WIDTH, Continuations, check_filter, check_nodes
from . import reference


class Collected(NamedTuple):
    """A search after a step."""

    items: Tensor  # int64 [B, k] by descending score, -1 past the end
    scores: Tensor  # float32 [B, k], -inf past the end
    broken: Tensor  # bool [B], as it was, or with the step's
    score: Tensor  # float32 [B, w] of the unfinished, -inf for those that cannot enter the best any more
    left: Tensor  # int64 [B, 3]: the unfinished that go on; the longest item of theirs, more than any where one of them
    #               leads to several; tokens of their items that are not read. The last two are 0 with ``unique``


def _takes(items: Tensor, *args: Any) -> None:
    triton_config.check_device(items)
    widest = max(items.shape[1], args[3].shape[1], args[5].shape[1])
    if widest > MAX_WIDTH:
        raise ValueError(f"items, unfinished, all: the triton backend takes at most {MAX_WIDTH} a user, got {widest}")


_OP = dispatch.op("trie_collect")
_OP.register("reference", reference.trie_collect)
_OP.register("triton", dispatch.on_use(f"{__package__}.triton_kernels", "forward"), check=_takes)


@dispatch.forward_op("trie_collect")
def _forward(
    items: Tensor, scores: Tensor, broken: Tensor, invalid: Tensor, open_score: Tensor, open_node: Tensor,
    score: Tensor, node: Tensor, key: Tensor, children: Tensor, leaf_begin: Tensor, leaf_end: Tensor, item: Tensor,
    lengths: Tensor, scale: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int, depth: int,
    longest: int, unique: bool, filter: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    same = (x.new_empty(x.shape) for x in (items, scores, broken, open_score))
    return *same, items.new_empty((len(items), 3))  # type: ignore[return-value]


def _check_selections(items: Tensor, scores: Tensor, broken: Tensor, invalid: Tensor, **selections: Any) -> None:
    checks.tensor("items", items, "B k", dtypes=(torch.int64,))
    if items.shape[1] < 1:
        raise ValueError(f"items: expected k >= 1, got {tuple(items.shape)}")
    checks.tensor("scores", scores, "B k", dtypes=(torch.float32,), beside=("items", items))
    checks.same("scores", tuple(scores.shape), tuple(items.shape), "[B, k] of items")
    for name, x in (("broken", broken), ("invalid", invalid)):
        checks.tensor(name, x, "B", dtypes=(torch.bool,), beside=("items", items))
        checks.same(name, len(x), len(items), "B of items")
    for name, x in selections.items():
        if not isinstance(x, Continuations):
            raise ValueError(f"{name}: expected Continuations, got {type(x).__name__}")
        for field, value in (("score", x.score), ("node", x.node), ("key", x.key)):
            dtype = torch.float32 if field == "score" else torch.int64
            checks.tensor(f"{name}.{field}", value, "B n", dtypes=(dtype,), beside=("items", items))
            shape = (len(items), x.score.shape[1])
            checks.same(f"{name}.{field}", tuple(value.shape), shape, "B of items, n of its score")


def _check_trie(items: Tensor, lengths: Tensor, item: Tensor, scale: Tensor, **nodes: Tensor) -> None:
    check_nodes(("items", items), "leaf_begin", **nodes)
    for name, x in (("lengths", lengths), ("item", item)):
        checks.tensor(name, x, "C", dtypes=(torch.int32,), beside=("items", items))
    checks.same("item", len(item), len(lengths), "C of lengths")
    checks.tensor("scale", scale, "n", dtypes=(torch.float32,), beside=("items", items))


def trie_collect(
    items: Tensor,
    scores: Tensor,
    broken: Tensor,
    invalid: Tensor,
    unfinished: Continuations,
    all: Continuations,
    children: Tensor,
    leaf_begin: Tensor,
    leaf_end: Tensor,
    item: Tensor,
    lengths: Tensor,
    scale: Tensor,
    *,
    depth: int,
    longest: int,
    unique: bool = False,
    filter: str = "none",
    listed: Tensor | None = None,
    offset: Tensor | None = None,
    entries: int = 0,
) -> Collected:
    """The k best items after a step, and the unfinished continuations that can still enter them, in one launch.

    Selections are those that :func:`flr_kernels.trie_step` gave; their nodes are not looked at again.

    Args:
        items, scores: int64 and float32 [B, k], k >= 1, so far; the score of none is -inf.
        broken, invalid: bool [B], which users had logits that are not finite, before and in the step.
        unfinished, all, children, leaf_begin, leaf_end: of :func:`flr_kernels.trie_step`, each n >= 0 wide.
        item, lengths: int32 [C], index and tokens of the item at each leaf position.
        scale: float32 [depth of the trie + 1], above 0, what the log-probability of an item of so many tokens is
            divided by.
        depth: tokens of the unfinished.
        longest: tokens of the item whose scale gives the best score that an unfinished one can get.
        unique, filter, listed, offset, entries: as of :func:`flr_kernels.trie_step`.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> def ints(*x):
        ...     return torch.tensor(x, dtype=torch.int32)
        >>> one, none = torch.zeros(1, dtype=torch.bool), torch.tensor([[-1]])
        >>> def some(score, node):
        ...     x = torch.tensor([[node]])
        ...     return flr_kernels.Continuations(torch.tensor([[score]]), x, x, x)
        >>> import flr_kernels
        >>> found = trie_collect(none, torch.full((1, 1), -torch.inf), one, one, some(-3.0, 1), some(-2.0, 2),
        ...                      ints(1, 3, 5, 5, 5, 5), ints(0, 0, 2, 0, 1), ints(3, 2, 3, 1, 2), ints(7, 8, 9),
        ...                      ints(2, 2, 1), torch.ones(3), depth=1, longest=2)
        >>> found.items.tolist(), found.scores.tolist(), found.score.tolist()
        ([[9]], [[-2.0]], [[-inf]])
    """
    _check_selections(items, scores, broken, invalid, unfinished=unfinished, all=all)
    _check_trie(items, lengths, item, scale, children=children, leaf_begin=leaf_begin, leaf_end=leaf_end)
    check_filter(("items", items), filter, listed, offset, entries)
    checks.integer("depth", depth, 0, (1 << 31) - 1)
    checks.integer("longest", longest, 0, len(scale) - 1)
    checks.flag("unique", unique)
    given = (items, scores, broken, invalid, unfinished.score, unfinished.node, all.score, all.node, all.key)
    found = _forward(
        *(x.contiguous() for x in given), children, leaf_begin, leaf_end, item, lengths, scale, listed, offset, entries,
        depth, longest, unique, filter,
    )  # fmt: skip
    return Collected(*found)
