"""Which items are allowed, against a plain look at every position."""

import pytest
import torch

from flr_kernels.allowed import Allowed

ITEMS, ENTRIES = 6, 4


def a_filter(kind: str, rows: list[list[int]], dtype: torch.dtype) -> Allowed:
    """Of users' listed positions, whose rows lie in the other order and behind a number that is nobody's."""
    if kind == "prefix":
        lists = [[sum(place < end for place in row) for end in range(ITEMS + 1)] for row in rows]
    else:
        lists = [row + [ITEMS] * (ENTRIES - len(row)) for row in rows]
    size = len(lists[0])
    flat = torch.tensor([99, *(place for row in lists[::-1] for place in row)], dtype=dtype)
    return Allowed(kind, flat, 1 + size * torch.arange(len(rows)).flip(0), size, ITEMS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["prefix", "only", "exclude"])
def test_every_range_of_every_list(kind, dtype):
    rows = [[], [0], [5], [0, 1, 2, 3], [1, 2, 4], [2, 3, 4, 5], [0, 2, 5]]
    allowed = [set(range(ITEMS)) - set(row) if kind == "exclude" else set(row) for row in rows]
    ranges = [(low, high) for low in range(ITEMS + 1) for high in range(low, ITEMS + 1)]
    found = a_filter(kind, rows, dtype)
    low, high = torch.tensor(ranges).T[:, None].expand(-1, len(rows), -1)
    below = [[sum(low <= place < high for place in some) for low, high in ranges] for some in allowed]
    assert found.count(low, high).tolist() == below
    assert found.first(low).tolist() == [
        [min((place for place in some if place >= low), default=ITEMS) for low, _ in ranges] for some in allowed
    ]
    assert found.last(high).tolist() == [
        [max((place for place in some if place < high), default=-1) for _, high in ranges] for some in allowed
    ]
