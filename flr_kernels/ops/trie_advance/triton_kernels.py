"""Triton kernel of :func:`flr_kernels.trie_advance`: one launch, several programs a user.

A program makes some rows of the tables of who sees what: of hypotheses first, then of the columns that are read. What
follows from all hypotheses of the user (branchings, whose a column is) each program works out for itself: that is a few
dozen loads, and saves a launch. Only reads of a trie and of a filter; results do not depend on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends import triton_config
from ...backends.triton_plan import Plan, planned
from ...backends.triton_trie import ancestor, first_allowed, last_allowed

_NUMBERS = ["tiles", "count", "earlier", "behind", "columns", "M", "C", "E", "STEPS", "NODE_STEPS", "HALVINGS"]


@triton.jit
def _ways(
    node, live, before, begin_ptr, end_ptr, lengths_ptr, keys_ptr, filter_ptr, M, C, E, STEPS, NODE_STEPS, HALVINGS,
    FILTER: tl.constexpr,
):  # fmt: skip
    """Branchings, their depths, and allowed leaf positions below."""
    low_leaf = tl.load(begin_ptr + node, mask=live, other=0).to(tl.int64)
    high_leaf = tl.load(end_ptr + node, mask=live, other=0).to(tl.int64)
    first = first_allowed(low_leaf, live, filter_ptr, E, STEPS, C, FILTER)
    first = tl.where(live, tl.minimum(first, C - 1), 0)
    last = last_allowed(high_leaf, live, filter_ptr, E, STEPS, C, FILTER)
    low = before
    high = tl.load(lengths_ptr + first, mask=live, other=0).to(tl.int64)
    for _ in range(HALVINGS):
        middle = (low + high + 1) // 2
        above = tl.maximum(ancestor(keys_ptr, first, middle, M, NODE_STEPS, C), 0)
        both = tl.load(begin_ptr + above, mask=live, other=0) <= first
        both = both & (tl.load(end_ptr + above, mask=live, other=0) > last)
        low = tl.where(both, middle, low)
        high = tl.where(both, high, middle - 1)
    depth = tl.where(live, low, before)
    return tl.where(live, ancestor(keys_ptr, first, depth, M, NODE_STEPS, C), node), depth, first


@triton.jit
def _of(numbers, hypothesis, there, h):
    """Some of ``numbers`` [W], by ``hypothesis`` [ROWS]."""
    return tl.sum(tl.where((h[None, :] == hypothesis[:, None]) & there[None, :], numbers[None, :], 0), 1)


@triton.jit(do_not_specialize=_NUMBERS)
def advance_kernel(
    score_ptr, node_ptr, parent_ptr, sees_ptr, depth_ptr, position_ptr, overflow_ptr, tokens_ptr, begin_ptr, end_ptr,
    lengths_ptr, keys_ptr, filter_ptr, offset_ptr,
    out_node_ptr, out_depth_ptr, out_lengths_ptr, out_last_ptr, out_overflow_ptr, out_token_ptr, out_position_ptr,
    out_sees_ptr, out_seen_ptr,
    tiles, count, earlier, behind, columns, M, C, E, STEPS, NODE_STEPS, HALVINGS,
    WAYS: tl.constexpr, FILTER: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    user, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    h = tl.arange(0, W)
    there, at = h < count, user * count + h
    node = tl.load(node_ptr + at, mask=there, other=0)
    parent = tl.load(parent_ptr + at, mask=there, other=0)
    before = tl.load(depth_ptr + user * earlier + parent, mask=there, other=0)
    if WAYS:
        live = tl.load(score_ptr + at, mask=there, other=-float("inf")) != -float("inf")
        if FILTER != "none":
            filter_ptr += tl.load(offset_ptr + user)
        node, depth, first = _ways(node, live, before, begin_ptr, end_ptr, lengths_ptr, keys_ptr, filter_ptr, M, C, E,
                                   STEPS, NODE_STEPS, HALVINGS, FILTER)  # fmt: skip
        reads = (depth - before).to(tl.int32)
    else:
        reads = there.to(tl.int32)
    ends = tl.cumsum(reads, 0)
    begins, total = ends - reads, tl.sum(reads, 0)
    if tile == 0:
        tl.store(out_node_ptr + at, node, mask=there)
        tl.store(out_depth_ptr + at, before + reads, mask=there)
        tl.store(out_lengths_ptr + at, reads.to(tl.int64), mask=there)
        last = tl.minimum(tl.maximum(ends - 1, 0), tl.maximum(columns - 1, 0))
        tl.store(out_last_ptr + at, user * columns + last, mask=there)
        over = tl.load(overflow_ptr + user) | (total > columns).to(tl.uint8)
        tl.store(out_overflow_ptr + user, over)

    row = tile * ROWS + tl.arange(0, ROWS)
    start = tl.load(position_ptr + user)
    if WAYS:
        column = row - count  # of what is read; below 0 for rows of hypotheses
        is_column = (column >= 0) & (column < columns)
        passed = (ends[None, :] <= column[:, None]) & there[None, :]
        owner = tl.minimum(tl.sum(passed.to(tl.int32), 1), count - 1)
        hypothesis = tl.where(column < 0, row, owner)
        begin, end = _of(begins, hypothesis, there, h), _of(ends, hypothesis, there, h)
        mother = tl.load(parent_ptr + user * count + hypothesis)
        used = is_column & (column < total)
        place = tl.where(used, column - begin, 0)
        above = tl.load(depth_ptr + user * earlier + mother) + place
        leaf = _of(first.to(tl.int32), hypothesis, there, h).to(tl.int64)
        read = tl.where(used, ancestor(keys_ptr, leaf, above + 1, M, NODE_STEPS, C), 1)
        out = user * columns + column
        tl.store(out_token_ptr + out, tl.load(tokens_ptr + read).to(tl.int64), mask=is_column)
        tl.store(out_position_ptr + out, start + above, mask=is_column)
    else:
        column = row * 0 - 1
        is_column = row < 0
        hypothesis = tl.minimum(row, count - 1)
        begin, end = hypothesis, hypothesis + 1
        mother = tl.load(parent_ptr + user * count + hypothesis)
        above = tl.load(depth_ptr + user * earlier + mother)
        read = tl.maximum(tl.load(node_ptr + user * count + hypothesis), 1)
        out = user * count + hypothesis
        tl.store(out_token_ptr + out, tl.load(tokens_ptr + read).to(tl.int64), mask=row < count)
        tl.store(out_position_ptr + out, start + above, mask=row < count)
    size = behind + columns
    for begin_column in range(0, size, BLOCK):
        j = begin_column + tl.arange(0, BLOCK)
        past = tl.load(
            sees_ptr + (user * earlier + mother)[:, None] * behind + j[None, :],
            mask=(row < count + columns)[:, None] & (j < behind)[None, :], other=0,
        )  # fmt: skip
        own = j[None, :] - behind
        mine = (begin[:, None] <= own) & (own < end[:, None])
        if WAYS:
            mine = mine & ((column < 0)[:, None] | (own <= column[:, None])) | (own == column[:, None])
        value = tl.where((j < behind)[None, :], past, mine.to(tl.uint8))
        inside = (j < size)[None, :]
        tl.store(
            out_sees_ptr + (user * count + row)[:, None] * size + j[None, :], value,
            mask=(row < count)[:, None] & inside,
        )  # fmt: skip
        if WAYS:
            tl.store(
                out_seen_ptr + (user * columns + column)[:, None] * size + j[None, :], value,
                mask=is_column[:, None] & inside,
            )  # fmt: skip


_TENSORS = (
    *("score_ptr", "node_ptr", "parent_ptr", "sees_ptr", "depth_ptr", "position_ptr", "overflow_ptr", "tokens_ptr"),
    *("begin_ptr", "end_ptr", "lengths_ptr", "keys_ptr", "filter_ptr", "offset_ptr"),
)


@planned
def _plan(
    shape: tuple[int, int], earlier: tuple[int, int], columns: int, nodes: int, items: int, entries: int, deepest: int,
    ways: bool, filter: str, device: torch.device, *dtypes: torch.dtype,
) -> Plan:  # fmt: skip
    users, count = shape
    plan = Plan(device, *dtypes)
    small = triton_config.interpreted()
    width = next(size for size in ((4, 32, 256) if small else (16, 64, 256)) if size >= count)
    rows, block = (4, 8) if small else (16, 64)
    arguments = dict(zip(_TENSORS, plan.inputs, strict=True))
    for name in ("node", "depth", "lengths", "last"):
        arguments[f"out_{name}_ptr"] = plan.result(shape, torch.int64)
    arguments["out_overflow_ptr"] = plan.result((users,), torch.uint8)
    for name in ("token", "position"):
        arguments[f"out_{name}_ptr"] = plan.result((users, columns), torch.int64)
    size = earlier[1] + columns
    arguments["out_sees_ptr"] = plan.result((users, count, size), torch.uint8)
    arguments["out_seen_ptr"] = plan.result((users, columns if ways else 0, size), torch.uint8)
    tiles = -(-(count + (columns if ways else 0)) // rows)
    numbers = {
        "tiles": tiles, "count": count, "earlier": earlier[0], "behind": earlier[1], "columns": columns, "M": nodes,
        "C": items, "E": entries, "STEPS": max(entries, 1).bit_length(), "NODE_STEPS": nodes.bit_length(),
        "HALVINGS": max(deepest, 1).bit_length(),
    }  # fmt: skip
    constants = {"WAYS": ways, "FILTER": filter, "W": width, "ROWS": rows, "BLOCK": block}
    plan.launch(advance_kernel, users * tiles, {**arguments, **numbers}, constants, num_warps=4)
    return plan


def forward(
    score: Tensor, node: Tensor, parent: Tensor, sees: Tensor, depth: Tensor, position: Tensor, overflow: Tensor,
    tokens: Tensor, leaf_begin: Tensor, leaf_end: Tensor, lengths: Tensor, keys: Tensor | None, listed: Tensor | None,
    offset: Tensor | None, entries: int, columns: int, deepest: int, filter: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The reference's arguments and result."""
    filters = (tokens, node) if listed is None or offset is None else (listed, offset)
    flags = sees.view(torch.uint8), overflow.view(torch.uint8)
    given = (score, node, parent, flags[0], depth, position, flags[1], tokens, leaf_begin, leaf_end, lengths,
             node if keys is None else keys, *filters)  # fmt: skip
    tensors = [x.contiguous() for x in given]
    users, count = node.shape
    plan = _plan(
        (users, count), (sees.shape[1], sees.shape[2]), columns, len(tokens), len(lengths), entries, deepest,
        keys is not None, filter, node.device, *(x.dtype for x in tensors),
    )  # fmt: skip
    found = plan.run(*tensors)
    over, *rows = (x.view(torch.bool) for x in (found[4], *found[7:]))
    return *found[:4], over, *found[5:7], *rows
