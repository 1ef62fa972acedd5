"""Triton kernel of :func:`flr_kernels.trie_collect`: one launch, a program a user.

An item and its score are one int64 that sorts by (score, -item), as continuations are in ``trie_step``: the best are
sorted as such keys, and item and score are read out of them again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends import triton_config
from ...backends.triton_plan import Plan, planned
from ...backends.triton_trie import allowed_count, first_allowed

_NUMBERS = ["k", "ended", "going", "depth", "longest", "most", "C", "E", "STEPS"]


@triton.jit(do_not_specialize=_NUMBERS)
def collect_kernel(
    items_ptr, scores_ptr, broken_ptr, invalid_ptr, open_score_ptr, open_node_ptr, score_ptr, node_ptr, key_ptr,
    children_ptr, begin_ptr, end_ptr, item_ptr, lengths_ptr, scale_ptr, filter_ptr, offset_ptr,
    out_items_ptr, out_scores_ptr, out_broken_ptr, out_open_ptr, out_left_ptr,
    k, ended, going, depth, longest, most, C, E, STEPS,
    FILTER: tl.constexpr, UNIQUE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    user = tl.program_id(0).to(tl.int64)
    dead = tl.full([BLOCK], -9223372036854775808, tl.int64)
    lanes = tl.arange(0, BLOCK)
    # the best so far, then what the step gave
    old = lanes < k
    score = tl.load(scores_ptr + user * k + lanes, mask=old, other=-float("inf"))
    item = tl.maximum(tl.load(items_ptr + user * k + lanes, mask=old, other=0), 0)
    at = user * ended + lanes - k
    alive = (lanes >= k) & (lanes < k + ended)
    alive = alive & (tl.load(key_ptr + at, mask=alive, other=-9223372036854775808) != dead)
    node = tl.load(node_ptr + at, mask=alive, other=0)
    leaf = tl.load(begin_ptr + node, mask=alive, other=0).to(tl.int64)
    if UNIQUE:
        if FILTER != "none":
            filter_ptr += tl.load(offset_ptr + user)
        high = tl.load(end_ptr + node, mask=alive, other=0).to(tl.int64)
        is_item = alive & (allowed_count(leaf, high, alive, filter_ptr, E, STEPS, FILTER) == 1)
        leaf = tl.minimum(first_allowed(leaf, alive, filter_ptr, E, STEPS, C, FILTER), C - 1)
    else:
        is_item = tl.load(children_ptr + node, mask=alive, other=0) == tl.load(
            children_ptr + node + 1, mask=alive, other=1
        )
        is_item = alive & is_item
    length = tl.load(lengths_ptr + leaf, mask=is_item, other=0)
    new = tl.load(score_ptr + at, mask=is_item, other=-float("inf"))
    new = tl.div_rn(new, tl.load(scale_ptr + length, mask=is_item, other=1.0))
    score = tl.where(is_item, new, score)
    item = tl.where(is_item, tl.load(item_ptr + leaf, mask=is_item, other=0).to(tl.int64), item)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 becomes 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(score == -float("inf"), dead, (ordered << 32) | (4294967295 - item))

    key, best = tl.topk(key, KEEP), tl.arange(0, KEEP)
    there = key != -9223372036854775808
    ordered = (key >> 32).to(tl.int32)
    score = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    score = tl.where(there, score, -float("inf"))
    tl.store(out_items_ptr + user * k + best, tl.where(there, 4294967295 - (key & 4294967295), -1), mask=best < k)
    tl.store(out_scores_ptr + user * k + best, score, mask=best < k)
    least = tl.max(tl.where(best == k - 1, score, -float("inf")), 0)
    tl.store(out_broken_ptr + user, tl.load(broken_ptr + user) | tl.load(invalid_ptr + user))

    # who goes on
    h = tl.arange(0, WIDTH)
    at = user * going + h
    score = tl.load(open_score_ptr + at, mask=h < going, other=-float("inf"))
    bound = tl.div_rn(score, tl.load(scale_ptr + longest + h * 0))
    score = tl.where(bound < least, -float("inf"), score)
    tl.store(out_open_ptr + at, score, mask=h < going)
    live = (score != -float("inf")) & (h < going)
    tl.store(out_left_ptr + user * 3, tl.sum(live.to(tl.int64), 0))
    if UNIQUE:
        tl.store(out_left_ptr + user * 3 + tl.arange(1, 3), tl.full([2], 0, tl.int64))
    else:
        node = tl.load(open_node_ptr + at, mask=live, other=0)
        leaf = tl.load(begin_ptr + node, mask=live, other=0)
        several = tl.load(end_ptr + node, mask=live, other=0) - leaf > 1
        ahead = tl.load(lengths_ptr + tl.minimum(leaf, C - 1), mask=live, other=0)
        tl.store(out_left_ptr + user * 3 + 1, tl.max(tl.where(live & several, most, ahead), 0).to(tl.int64))
        to_read = tl.where(live, tl.maximum(ahead - depth, 0), 0)
        tl.store(out_left_ptr + user * 3 + 2, tl.sum(to_read, 0).to(tl.int64))


_TENSORS = (
    *("items_ptr", "scores_ptr", "broken_ptr", "invalid_ptr", "open_score_ptr", "open_node_ptr", "score_ptr"),
    *("node_ptr", "key_ptr", "children_ptr", "begin_ptr", "end_ptr", "item_ptr", "lengths_ptr", "scale_ptr"),
    *("filter_ptr", "offset_ptr"),
)


@planned
def _plan(
    users: int, sizes: tuple[int, int, int], items: int, entries: int, depth: int, longest: int, most: int,
    unique: bool, filter: str, device: torch.device, *dtypes: torch.dtype,
) -> Plan:  # fmt: skip
    k, ended, going = sizes
    plan = Plan(device, *dtypes)
    arguments = dict(zip(_TENSORS, plan.inputs, strict=True))
    arguments["out_items_ptr"] = plan.result((users, k), torch.int64)
    arguments["out_scores_ptr"] = plan.result((users, k), torch.float32)
    arguments["out_broken_ptr"] = plan.result((users,), torch.uint8)
    arguments["out_open_ptr"] = plan.result((users, going), torch.float32)
    arguments["out_left_ptr"] = plan.result((users, 3), torch.int64)
    kept = (4, 16, 256) if triton_config.interpreted() else (16, 64, 256)
    keep, width = (next(size for size in kept if size >= wanted) for wanted in (k, going))
    block = next(size for size in (*kept, 512) if size >= max(k + ended, keep))
    numbers = {
        "k": k, "ended": ended, "going": going, "depth": depth, "longest": longest, "most": most, "C": items,
        "E": entries, "STEPS": max(entries, 1).bit_length(),
    }  # fmt: skip
    constants = {"FILTER": filter, "UNIQUE": unique, "KEEP": keep, "BLOCK": block, "WIDTH": width}
    plan.launch(collect_kernel, users, {**arguments, **numbers}, constants, num_warps=8 if block > 256 else 4)
    return plan


def forward(
    items: Tensor, scores: Tensor, broken: Tensor, invalid: Tensor, open_score: Tensor, open_node: Tensor,
    score: Tensor, node: Tensor, key: Tensor, children: Tensor, leaf_begin: Tensor, leaf_end: Tensor, item: Tensor,
    lengths: Tensor, scale: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int, depth: int,
    longest: int, unique: bool, filter: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The reference's arguments and result."""
    flags = broken.view(torch.uint8), invalid.view(torch.uint8)
    filters = (lengths, items) if listed is None or offset is None else (listed, offset)
    given = (items, scores, *flags, open_score, open_node, score, node, key, children, leaf_begin, leaf_end, item,
             lengths, scale, *filters)  # fmt: skip
    tensors = [x.contiguous() for x in given]
    plan = _plan(
        len(items), (items.shape[1], score.shape[1], open_score.shape[1]), len(lengths), entries, depth, longest,
        len(scale), unique, filter, items.device, *(x.dtype for x in tensors),
    )  # fmt: skip
    best, values, over, going, left = plan.run(*tensors)
    return best, values, over.view(torch.bool), going, left
