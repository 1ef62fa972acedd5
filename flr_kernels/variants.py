"""Calls of the ops' host code that launch every variant of the Triton kernels; see ``flr_kernels.inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from .backends import triton_config

#: A size whose rows are 16-byte aligned, like every model's, and which no block size divides, so that masks are kept.
_SIZE = 1552


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(
    dtype: torch.dtype, size: int = _SIZE, empty: Callable[..., torch.Tensor] = _meta
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of the ops' host code that between them launch every kernel variant for ``dtype`` and D = ``size``.

    ``empty(*shape, dtype=torch.float32)`` makes their tensors, whose values do not matter.
    """
    from .ops.factor_aggregate import triton_kernels as aggregate
    from .ops.factor_attention import triton_host as attention
    from .ops.log_normaliser import triton_kernels as normaliser
    from .ops.token_logprob import triton_kernels as logprob

    batch, factors = 2, 4
    vectors, scalars, square = (batch, factors, size), (batch, factors), (batch, factors, factors)
    saved = (empty(*vectors), empty(*scalars), empty(*square), empty(*scalars))
    u = empty(*vectors, dtype=dtype)
    for tile, splits in product(triton_config.tiles(dtype.itemsize, backward=False)[::-1], (1, 3)):
        h = empty(batch, tile.block_l * splits, size, dtype=dtype)
        yield f"{tile.name} {'split' if splits > 1 else 'whole'}", partial(attention.forward, h, u, None, tile=tile)
    for tile, splits, dh in product(triton_config.tiles(dtype.itemsize, backward=True)[::-1], (1, 3), (True, False)):
        h = empty(batch, tile.block_l * splits, size, dtype=dtype)
        label = f"{tile.name} {'split' if splits > 1 else 'whole'}{'' if dh else ' no dh'}"
        yield label, partial(attention.backward, h, u, None, saved, saved, dh, tile=tile)
    f, gradients = empty(*vectors, dtype=dtype), (empty(batch, size), empty(*scalars), empty(batch), empty(batch))
    yield "", partial(aggregate.forward, f, empty(*scalars), 1e-6)
    yield "", partial(normaliser.forward, empty(batch, 99 * size, dtype=dtype))
    row = empty(batch)
    logits = empty(batch, 99 * size, dtype=dtype)
    yield "", partial(logprob.logits_gradient, logits, row, empty(batch, dtype=torch.int64), row)
    yield "", partial(aggregate.backward, f, empty(*scalars), *gradients, 1e-6)
    yield from _trie_steps(dtype, size, empty)
    if dtype == torch.bfloat16:  # whatever the model's
        yield from _trie_levels(size, empty)


def _trie_steps(
    dtype: torch.dtype, size: int, empty: Callable[..., torch.Tensor]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Both selections at once: one alone is a part of the same program."""
    from .ops.trie_step import triton_kernels as trie_step

    users, hypotheses, nodes = 2, 10, size
    score, node = empty(users, hypotheses), empty(users, hypotheses, dtype=torch.int64)
    arrays = [empty(nodes, dtype=torch.int32) for _ in range(4)]
    grid = list(product(("none",), (10, 50, 200), (100, 5000), (False, True)))
    grid += product(("prefix", "only", "exclude"), (10,), (5000,), (False, True))
    for filter, width, widest, unique in grid if dtype == torch.bfloat16 else grid[:2]:
        listed = None if filter == "none" else empty(size, dtype=torch.int32 if filter == "prefix" else torch.int64)
        offset = None if listed is None else empty(users, dtype=torch.int64)
        arguments: tuple[Any, ...] = (
            empty(users, hypotheses, 99 * size, dtype=dtype), score, node, None if unique else score, *arrays, listed,
            offset, 16, width, width, widest, unique, filter,
        )  # fmt: skip
        yield f"{filter} {width} of {widest}{' unique' if unique else ''}", partial(trie_step.forward, *arguments)


def _trie_levels(size: int, empty: Callable[..., torch.Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What lies between two trie steps: a token each, or the ways to branchings under every filter, and collecting."""
    from .ops.trie_advance import triton_kernels as advance
    from .ops.trie_collect import triton_kernels as collect

    users, ints, longs = 2, partial(empty, dtype=torch.int32), partial(empty, dtype=torch.int64)
    flags, nodes = partial(empty, dtype=torch.bool), [ints(size) for _ in range(5)]
    for filter, width in [("none", 10), ("none", 50), ("none", 200), ("prefix", 200), ("only", 200), ("exclude", 200)]:
        listed = None if filter == "none" else (ints if filter == "prefix" else longs)(size)
        filters = listed, None if listed is None else longs(users), 16
        score, node = empty(users, width), longs(users, width)
        hypotheses = (score, node, node, flags(users, width, 24), node, longs(users), flags(users))
        for keys in (None, longs(size)):
            if keys is not None or filter == "none":
                columns = width if keys is None else 3 * width
                arguments: Any = (*hypotheses, *nodes[:4], keys, *filters, columns, 6, filter)
                label = f"{filter} {width}{'' if keys is None else ' ways'}"
                yield label, partial(advance.forward, *arguments)
        for unique in (False, True) if filter == "none" else (True,):
            best = (longs(users, width), empty(users, width), flags(users), flags(users))
            arguments = (*best, score, node, score, node, node, *nodes, empty(7), *filters, 3, 5, unique, filter)
            yield f"{filter} {width}{' unique' if unique else ''}", partial(collect.forward, *arguments)
