"""What beam search and exhaustive scoring share: the two scorings, the normaliser over the vocabulary, a sort key."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch

from .trie import CatalogueTrie

Scoring = Literal["full", "catalogue"]

_CACHED_CELLS = 1 << 18  # logits normalised at a time on a CPU: 1 MiB, so that they stay in its cache


def check_scoring(scoring: str, name: str = "scoring") -> None:
    if scoring not in get_args(Scoring):
        raise ValueError(f"{name} must be one of {list(get_args(Scoring))}, got {scoring!r}")


def resolve_scoring(scoring: str, trained: Scoring) -> Scoring:
    """``scoring``; for "auto" the one that the model was trained for (a processor's ``scoring``)."""
    if scoring == "auto":
        return trained
    if scoring not in get_args(Scoring):
        raise ValueError(f"scoring must be one of {['auto', *get_args(Scoring)]}, got {scoring!r}")
    return cast(Scoring, scoring)


def check_vocabulary(trie: CatalogueTrie, logits: torch.Tensor) -> None:
    if trie.max_token >= logits.shape[-1]:
        raise ValueError(f"the catalogue uses token {trie.max_token}, the model's vocabulary has {logits.shape[-1]}")


def order_key(score: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
    """int64 that sorts like (score, -tie): unique keys make top-k deterministic. tie in 0 .. 2**32 - 1."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (0xFFFFFFFF - tie)


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """log sum exp over the vocabulary in float32, [..., V] -> [...].

    On a CPU a block of rows at a time: log_softmax of what fits the cache, of which one value a row is kept, takes a quarter of
    the time of torch.logsumexp over all (float32, 320 rows of 151,936: 66 ms against 255 and 338 ms).
    """
    if logits.device.type != "cpu" or logits.numel() == 0:
        return torch.logsumexp(logits.float(), dim=-1)
    rows = logits.reshape(-1, logits.shape[-1])
    blocks = (block.float() for block in rows.split(max(1, _CACHED_CELLS // rows.shape[1])))
    # at the largest logit, where the difference loses nothing; NaN where a row is not finite
    norms = [block.amax(-1) - torch.log_softmax(block, dim=-1).amax(-1) for block in blocks]
    return torch.cat(norms).view(logits.shape[:-1])
