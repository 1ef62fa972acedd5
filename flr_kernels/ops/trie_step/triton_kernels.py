"""Triton kernels of :func:`flr_kernels.trie_step`: from logits to the best continuations in two launches or more.

A continuation is one int64 that sorts by (score, -leaf position): the score's bits made monotonic above, the complement
of the child's first leaf position below. Hypotheses of a user have disjoint ranges of leaves, so the key is all that is
kept: it says the score exactly, and from the leaf position follow the parent (whose range holds it) and the child
(binary search).

    normaliser   a program a hypothesis: log-sum-exp over its allowed children (only where none was given)
    candidates   a program a hypothesis and block of children: keys, sorted, the best P of either selection kept
    reduce       a program a selection, user and block of keys: the best P; again until a user's fit one block
    finish       a program a selection and user: the best, with score, node and parent

Both selections go through the same launches: their keys lie one behind the other, those of the unfinished first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends import triton_config
from ...backends.triton_launch import add_exponentials, log_sum
from ...backends.triton_plan import Memory, Plan, planned
from ...backends.triton_trie import allowed_count

#: Keys that a program sorts at a time, and that it keeps: few sizes, so few variants are compiled; 1,024 keys spill.
_BLOCKS, _KEPT = (128, 512), (16, 64, 256)
_INTERPRETED = (4, 16), (2, 4, 8, 16, 64)


@triton.jit
def _children(
    child, valid, row, user, logits_ptr, row_stride, tokens_ptr, begin_ptr, end_ptr, filter_ptr, offset_ptr, E, STEPS,
    FILTER: tl.constexpr,
):  # fmt: skip
    """Logit (-inf where nothing below is allowed), first leaf position and allowed items of some children."""
    low = tl.load(begin_ptr + child, mask=valid, other=0).to(tl.int64)
    high = tl.load(end_ptr + child, mask=valid, other=0).to(tl.int64)
    if FILTER != "none":
        filter_ptr += tl.load(offset_ptr + user)
    count = allowed_count(low, high, valid, filter_ptr, E, STEPS, FILTER)
    valid = valid & (count > 0)
    token = tl.load(tokens_ptr + child, mask=valid, other=0).to(tl.int64)
    logit = tl.load(logits_ptr + row * row_stride + token, mask=valid, other=-float("inf")).to(tl.float32)
    return logit, low, count


@triton.jit(do_not_specialize=["E", "STEPS", "hypotheses"])
def normaliser_kernel(
    logits_ptr, row_stride, score_ptr, node_ptr, children_ptr, tokens_ptr, begin_ptr, end_ptr, filter_ptr, offset_ptr,
    norm_ptr, hypotheses, E, STEPS, FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    user = row // hypotheses
    node = tl.load(node_ptr + row)
    first = tl.load(children_ptr + node)
    last = tl.load(children_ptr + node + 1)
    last = tl.where(tl.load(score_ptr + row) == -float("inf"), first, last)
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        child = start + lanes
        x, _, _ = _children(child, child < last, row, user, logits_ptr, row_stride, tokens_ptr, begin_ptr, end_ptr,
                            filter_ptr, offset_ptr, E, STEPS, FILTER)  # fmt: skip
        m, s = add_exponentials(m, s, x)
    tl.store(norm_ptr + row, log_sum(m, s))


@triton.jit(do_not_specialize=["E", "STEPS", "hypotheses", "blocks"])
def candidates_kernel(
    logits_ptr, row_stride, score_ptr, node_ptr, norm_ptr, children_ptr, tokens_ptr, begin_ptr, end_ptr, filter_ptr,
    offset_ptr, keys_ptr, hypotheses, blocks, E, STEPS,
    FILTER: tl.constexpr, UNIQUE: tl.constexpr, OPEN: tl.constexpr, ALL: tl.constexpr, KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    node = tl.load(node_ptr + row)
    score = tl.load(score_ptr + row)
    first = tl.load(children_ptr + node)
    last = tl.load(children_ptr + node + 1)
    last = tl.where(score == -float("inf"), first, last)
    child = first + block.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    valid = child < last
    logit, low, count = _children(child, valid, row, row // hypotheses, logits_ptr, row_stride, tokens_ptr, begin_ptr,
                                  end_ptr, filter_ptr, offset_ptr, E, STEPS, FILTER)  # fmt: skip
    total = logit - tl.load(norm_ptr + row) + score
    bits = (total + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 becomes 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    dead = tl.full([BLOCK], -9223372036854775808, tl.int64)
    key = tl.where(valid & (total > -float("inf")), (ordered << 32) | (4294967295 - low), dead)
    out_ptr = keys_ptr + program * KEEP + tl.arange(0, KEEP)
    if OPEN:
        if UNIQUE:
            ends = count == 1
        else:
            ends = tl.load(children_ptr + child, mask=valid, other=0) == tl.load(
                children_ptr + child + 1, mask=valid, other=0
            )
        tl.store(out_ptr, tl.topk(tl.where(ends, dead, key), KEEP))
        out_ptr += tl.num_programs(0).to(tl.int64) * KEEP
    if ALL:
        tl.store(out_ptr, tl.topk(key, KEEP))


@triton.jit(do_not_specialize=["count", "blocks"])
def reduce_kernel(keys_ptr, out_ptr, count, blocks, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks  # a row is a user of a selection
    at = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + row * count + at, mask=at < count, other=-9223372036854775808)
    tl.store(out_ptr + program * KEEP + tl.arange(0, KEEP), tl.topk(key, KEEP))


@triton.jit
def _store_selection(
    score_ptr, node_ptr, parent_ptr, key_ptr, user, width, score, node, parent, key, KEEP: tl.constexpr
):
    best = tl.arange(0, KEEP)
    at, wanted = user * width + best, best < width
    live = key != -9223372036854775808
    tl.store(score_ptr + at, tl.where(live, score, -float("inf")), mask=wanted)
    tl.store(node_ptr + at, tl.where(live, node.to(tl.int64), 0), mask=wanted)
    tl.store(parent_ptr + at, tl.where(live, parent.to(tl.int64), 0), mask=wanted)
    tl.store(key_ptr + at, key, mask=wanted)


@triton.jit(do_not_specialize=["users", "count", "hypotheses", "width_0", "width_1", "SEARCH"])
def finish_kernel(
    keys_ptr, score_ptr, node_ptr, norm_ptr, children_ptr, begin_ptr, end_ptr,
    score_0_ptr, node_0_ptr, parent_0_ptr, key_0_ptr, score_1_ptr, node_1_ptr, parent_1_ptr, key_1_ptr, invalid_ptr,
    users, count, hypotheses, width_0, width_1, SEARCH,
    KEEP: tl.constexpr, HYPOTHESES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    user = row % users
    lanes = tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + row * count + lanes, mask=lanes < count, other=-9223372036854775808)
    key = tl.topk(key, KEEP)
    live = key != -9223372036854775808
    ordered = (key >> 32).to(tl.int32)
    score = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    leaf = tl.where(live, 4294967295 - (key & 4294967295), 0)

    parent = tl.zeros([KEEP], tl.int32)
    broken = tl.zeros([HYPOTHESES], tl.int32)
    for start in range(0, hypotheses, HYPOTHESES):
        column = start + tl.arange(0, HYPOTHESES)
        at = user * hypotheses + column
        there = column < hypotheses
        there = there & (tl.load(score_ptr + at, mask=there, other=-float("inf")) != -float("inf"))
        node = tl.load(node_ptr + at, mask=there, other=0)
        norm = tl.load(norm_ptr + at, mask=there, other=0.0)
        low = tl.load(begin_ptr + node, mask=there, other=0).to(tl.int64)
        high = tl.load(end_ptr + node, mask=there, other=0).to(tl.int64)
        holds = there[None, :] & (low[None, :] <= leaf[:, None]) & (leaf[:, None] < high[None, :])
        parent = tl.maximum(parent, tl.max(tl.where(holds, column[None, :], 0), 1))
        broken = broken | (there & ~(tl.abs(norm) < float("inf"))).to(tl.int32)
    tl.store(invalid_ptr + user, tl.max(broken, 0).to(tl.uint8), mask=row < users)

    above = tl.load(node_ptr + user * hypotheses + parent)
    child = tl.load(children_ptr + above)  # the last child that begins at the leaf or before
    end = tl.load(children_ptr + above + 1)
    for _ in range(SEARCH):
        middle = (child + end) // 2
        further = (middle > child) & (tl.load(begin_ptr + middle, mask=middle < end, other=0) <= leaf)
        end = tl.where(further | (middle == child), end, middle)
        child = tl.where(further, middle, child)
    if row < users:
        _store_selection(
            score_0_ptr, node_0_ptr, parent_0_ptr, key_0_ptr, user, width_0, score, child, parent, key, KEEP
        )
    else:
        _store_selection(
            score_1_ptr, node_1_ptr, parent_1_ptr, key_1_ptr, user, width_1, score, child, parent, key, KEEP
        )


def _sizes(wanted: int, children: int) -> tuple[int, int]:
    """Keys kept, at least ``wanted``, and keys sorted for it, as many as there are children where that is possible."""
    blocks, kept = _INTERPRETED if triton_config.interpreted() else (_BLOCKS, _KEPT)
    keep = next(size for size in kept if size >= wanted)
    largest = max(blocks[-1], 2 * keep)
    return keep, next((size for size in blocks if size >= max(children, 2 * keep)), largest)


def _shrunk(plan: Plan, rows: int, keys: Memory, count: int, keep: int, block: int) -> tuple[Memory, int]:
    """The best of ``count`` keys among at most ``block`` keys a row; every block's best ``keep`` stay."""
    while count > block:
        blocks = -(-count // block)
        out = plan.working((rows, blocks * keep), torch.int64)
        arguments = {"keys_ptr": keys, "out_ptr": out, "count": count, "blocks": blocks}
        plan.launch(reduce_kernel, rows * blocks, arguments, {"KEEP": keep, "BLOCK": block}, num_warps=4)
        keys, count = out, blocks * keep
    return keys, count


#: The tensors of a plan by the kernels' names for them; the normaliser, if it is given, comes after these.
_TENSORS = (
    *("logits_ptr", "score_ptr", "node_ptr", "children_ptr", "tokens_ptr", "begin_ptr", "end_ptr"),
    *("filter_ptr", "offset_ptr"),
)


@planned
def _plan(
    row_stride: int, shape: tuple[int, int], entries: int, widths: tuple[int, int], widest: int, unique: bool,
    filter: str, device: torch.device, *dtypes: torch.dtype,
) -> Plan:  # fmt: skip
    users, hypotheses = shape
    plan = Plan(device, *dtypes)
    tensors = dict(zip(_TENSORS, plan.inputs, strict=False))
    step = {**tensors, "row_stride": row_stride, "hypotheses": hypotheses, "E": entries}
    step["STEPS"] = max(entries, 1).bit_length()
    results = [
        [plan.result((users, width), dtype) for dtype in (torch.float32, *[torch.int64] * 3)] for width in widths
    ]
    invalid = plan.result((users,), torch.uint8)
    keep, block = _sizes(max(widths), widest)
    if len(dtypes) > len(_TENSORS):
        norm = plan.inputs[-1]
    else:
        norm = plan.working(shape, torch.float32)
        constants = {"FILTER": filter, "BLOCK": block}
        plan.launch(normaliser_kernel, users * hypotheses, {**step, "norm_ptr": norm}, constants, num_warps=4)
    blocks = -(-widest // block)
    used = [index for index, width in enumerate(widths) if width] or [1]  # selections
    count, rows = hypotheses * blocks * keep, len(used) * users
    keys = plan.working((rows, count), torch.int64)
    plan.launch(
        candidates_kernel,
        users * hypotheses * blocks,
        {**step, "norm_ptr": norm, "keys_ptr": keys, "blocks": blocks},
        {"FILTER": filter, "UNIQUE": unique, "OPEN": 0 in used, "ALL": 1 in used, "KEEP": keep, "BLOCK": block},
        num_warps=4,
    )
    keys, count = _shrunk(plan, rows, keys, count, keep, _sizes(max(widths), 1 << 62)[1])
    arguments: dict[str, Any] = {
        name: tensors[name] for name in ("score_ptr", "node_ptr", "children_ptr", "begin_ptr", "end_ptr")
    }
    arguments |= {"norm_ptr": norm, "invalid_ptr": invalid, "keys_ptr": keys}
    arguments |= {"users": users, "count": count, "hypotheses": hypotheses, "SEARCH": widest.bit_length()}
    for place, index in enumerate((used[0], used[-1])):
        names = (f"{name}_{place}_ptr" for name in ("score", "node", "parent", "key"))
        arguments |= {**dict(zip(names, results[index], strict=True)), f"width_{place}": widths[index]}
    constants = {"KEEP": keep, "HYPOTHESES": 16, "BLOCK": _sizes(max(widths), count)[1]}
    plan.launch(finish_kernel, rows, arguments, constants, num_warps=4)
    return plan


def forward(
    logits: Tensor, score: Tensor, node: Tensor, norm: Tensor | None, children: Tensor, tokens: Tensor,
    leaf_begin: Tensor, leaf_end: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int,
    num_unfinished: int, num_all: int, widest: int, unique: bool, filter: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The reference's arguments and result."""
    users, hypotheses = node.shape
    rows = logits.reshape(users * hypotheses, logits.shape[-1])
    filters = (tokens, node) if listed is None or offset is None else (listed, offset)
    others = (score, node, children, tokens, leaf_begin, leaf_end, *filters, *([] if norm is None else [norm]))
    tensors = (rows, *[x.contiguous() for x in others])
    plan = _plan(
        rows.stride(0), (users, hypotheses), entries, (num_unfinished, num_all), widest, unique, filter, rows.device,
        *(x.dtype for x in tensors),
    )  # fmt: skip
    *best, invalid = plan.run(*tensors)
    return (*best, invalid.view(torch.bool))
