"""From the token sequences of items to the arrays of their trie; what these hold says :mod:`flr.data.trie`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def build(
    tokens: np.ndarray | Sequence[int], offsets: np.ndarray | Sequence[int]
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Arrays of the trie, int32, by name, and where its levels start.

    Level by level the items that have tokens left are sorted by node and token; what is numbered is below 2^31, so that
    all but the key of the sort are int32.

    Args:
        tokens, offsets: as for :meth:`flr.data.trie.CatalogueTrie.from_sequences`, whose errors these are.
    """
    tokens, offsets = _checked(tokens, offsets)
    length = np.diff(offsets).astype(np.int32)
    start, num_items = offsets[:-1], len(length)
    order = np.arange(num_items, dtype=np.int32)  # leaf position -> item; refined level by level
    slots = order.copy()  # positions whose item has tokens left
    group = np.zeros(num_items, np.int32)  # [slots] rank of the slot's node within its level
    node_token, node_begin, node_end = [_ints(-1)], [_ints(0)], [_ints(num_items)]
    fanout: list[np.ndarray] = [_ints(1)]
    level_start = [0, 1]
    span = int(tokens.max()) + 1
    for level in range(int(length.max())):
        key = group * np.int64(span)
        key += tokens[start[order[slots]] + level]
        permutation = np.argsort(key, kind="stable")
        order[slots] = order[slots[permutation]]
        key = key[permutation]  # groups keep their slots: they are contiguous and sort first
        del permutation
        first = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))  # [children] slot index
        key = key[first]
        size = np.diff(np.append(first, len(slots))).astype(np.int32)
        fanout.append(np.bincount(key // span, minlength=level_start[-1] - level_start[-2]).astype(np.int32))
        begin = slots[first]
        node_token.append((key % span).astype(np.int32))
        node_begin.append(begin)
        node_end.append(begin + size)
        level_start.append(level_start[-1] + len(first))
        ends = length[order[slots]] == level + 1
        rank = np.repeat(np.arange(len(first), dtype=np.int32), size)
        clash = np.flatnonzero(ends & (size[rank] > 1))
        if clash.size:
            at, short = begin[rank[clash[0]]], order[slots[clash[0]]]
            got = f"item {short} that begins item {next(item for item in order[at : at + 2] if item != short)}"
            raise ValueError(f"sequences: expected no item's tokens to begin another's, got {got}")
        # an internal node's rank counts leaves too: every node of the level is numbered
        slots, group = slots[~ends], rank[~ends]
    fanout.append(np.zeros(level_start[-1] - level_start[-2], np.int32))
    arrays = {
        "children": np.cumsum(np.concatenate(fanout), dtype=np.int32),
        "tokens": np.concatenate(node_token),
        "leaf_begin": np.concatenate(node_begin),
        "leaf_end": np.concatenate(node_end),
        "items": order,
        "lengths": length[order],
    }
    return arrays, level_start


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _checked(tokens: np.ndarray | Sequence[int], offsets: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of at least one item without an empty one, offsets int64; ValueError where they are not that."""
    tokens = np.ascontiguousarray(tokens)
    offsets = np.ascontiguousarray(offsets, dtype=np.int64)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"tokens: expected integers [total], got {tokens.dtype} {list(tokens.shape)}")
    if offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(f"offsets: expected [C + 1] with at least one item, got shape {list(offsets.shape)}")
    length = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (length < 0).any():
        wanted = f"to rise from 0 to len(tokens) = {len(tokens)}"
        raise ValueError(f"offsets: expected {wanted}, got {offsets[0]}..{offsets[-1]}")
    if (length == 0).any():
        raise ValueError(f"offsets: expected at least one token an item, got none for item {int(np.argmin(length))}")
    if tokens.min() < 0 or tokens.max() >= 2**31:
        raise ValueError(f"tokens: expected ids in [0, 2**31), got {tokens.min()}..{tokens.max()}")
    if len(tokens) >= 2**31 - 1:
        raise ValueError(f"tokens: expected at most 2**31 - 2 in all, got {len(tokens)}")
    return tokens.astype(np.int32, copy=False), offsets
