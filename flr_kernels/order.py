"""A sort key that makes every ranking total."""

from __future__ import annotations

import torch
from torch import Tensor


def order_key(score: Tensor, tie: Tensor) -> Tensor:
    """int64 that sorts like (score, -tie): unique keys make top-k deterministic. tie in 0 .. 2**32 - 1."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (0xFFFFFFFF - tie)
