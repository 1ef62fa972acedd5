"""What Triton kernels ask of a catalogue trie and a filter, as :class:`flr_kernels.allowed.Allowed` answers it.

``filter_ptr`` points at a user's row of E entries; C is the number of items, and STEPS halvings end a search in E.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank(row_ptr, position, E, STEPS):
    """How many of E ascending numbers are smaller."""
    low = position * 0
    high = low + E
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(row_ptr + middle, mask=open_, other=0) < position
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit
def _rank_of_gaps(listed_ptr, gap, E, STEPS, C):
    """How many of the ascending positions listed have fewer allowed ones than ``gap`` before them."""
    low = gap * 0
    high = low + E
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        entry = tl.load(listed_ptr + middle, mask=open_, other=0)
        below = tl.where(entry == C, C + 1, entry - middle) < gap
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit
def allowed_count(low, high, valid, filter_ptr, E, STEPS, FILTER: tl.constexpr):
    """Allowed items among leaf positions low..high-1."""
    if FILTER == "prefix":
        count = tl.load(filter_ptr + high, mask=valid, other=0) - tl.load(filter_ptr + low, mask=valid, other=0)
    elif FILTER == "only":
        count = rank(filter_ptr, high, E, STEPS) - rank(filter_ptr, low, E, STEPS)
    elif FILTER == "exclude":
        count = high - low - (rank(filter_ptr, high, E, STEPS) - rank(filter_ptr, low, E, STEPS))
    else:
        count = high - low
    return count


@triton.jit
def first_allowed(low, valid, filter_ptr, E, STEPS, C, FILTER: tl.constexpr):
    """The lowest allowed leaf position >= low, int64; C where there is none."""
    if FILTER == "prefix":
        before = tl.load(filter_ptr + low, mask=valid, other=0).to(tl.int64)
        first = rank(filter_ptr, before + 1, E, STEPS) - 1
    elif FILTER == "only":
        place = rank(filter_ptr, low, E, STEPS)
        first = tl.load(filter_ptr + place, mask=valid & (place < E), other=0).to(tl.int64)
        first = tl.where(place < E, first, C)
    elif FILTER == "exclude":
        place = rank(filter_ptr, low, E, STEPS)
        first = low + _rank_of_gaps(filter_ptr, low - place + 1, E, STEPS, C) - place
    else:
        first = low
    return first


@triton.jit
def last_allowed(high, valid, filter_ptr, E, STEPS, C, FILTER: tl.constexpr):
    """The highest allowed leaf position < high, int64; -1 where there is none."""
    if FILTER == "prefix":
        before = tl.load(filter_ptr + high, mask=valid, other=0).to(tl.int64)
        last = rank(filter_ptr, before, E, STEPS) - 1
    elif FILTER == "only":
        place = rank(filter_ptr, high, E, STEPS)
        last = tl.load(filter_ptr + place - 1, mask=valid & (place > 0), other=0).to(tl.int64)
        last = tl.where(place > 0, last, -1)
    elif FILTER == "exclude":
        place = rank(filter_ptr, high, E, STEPS)
        run = _rank_of_gaps(filter_ptr, high - place, E, STEPS, C)
        last = high - 1 - (place - tl.minimum(run, place))
    else:
        last = high - 1
    return last


@triton.jit
def ancestor(keys_ptr, leaf, depth, M, STEPS, C):
    """The node ``depth`` tokens below the root above a leaf position; keys are level · (C + 1) + first leaf."""
    return rank(keys_ptr, depth * (C + 1) + leaf + 1, M, STEPS) - 1
