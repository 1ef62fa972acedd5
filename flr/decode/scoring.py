"""What beam search and exhaustive scoring share: the normaliser, logits of a few tokens, the rank of a target."""

from __future__ import annotations

import torch

import flr_kernels
from flr.config import Normalisation, check_normalisation
from flr.data.trie import CatalogueTrie
from flr.model.head import HeadRows
from flr_kernels.ops.log_normaliser.reference import CACHED_CELLS

Scoring = Normalisation


def resolve_scoring(scoring: str, trained: Scoring) -> Scoring:
    """``scoring``; for "auto" the one that the model was trained for (a processor's ``scoring``)."""
    return trained if scoring == "auto" else check_normalisation("scoring", scoring, "auto")


def check_vocabulary(trie: CatalogueTrie, vocabulary: int) -> None:
    if trie.max_token >= vocabulary:
        raise ValueError(f"trie: expected tokens below the model's vocabulary of {vocabulary}, got {trie.max_token}")


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """log sum exp over the vocabulary in float32, [..., V] -> [...]; on a CPU from float32, in blocks of rows."""
    rows = logits.reshape(-1, logits.shape[-1])
    if logits.device.type == "cpu" and rows.dtype != torch.float32:
        blocks = rows.split(max(1, CACHED_CELLS // rows.shape[1]))
        return torch.cat([flr_kernels.log_normaliser(block.float()) for block in blocks]).view(logits.shape[:-1])
    return flr_kernels.log_normaliser(rows).float().view(logits.shape[:-1])


def token_logits(
    states: torch.Tensor, rows: HeadRows | None, token: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Logits float32 [B, w, c], new memory, of ``token`` int64 [B, w, c] or [1, 1, c]; -inf but where ``wanted``.

    ``states`` are logits [B, w, V], or the hidden states [B, w, D] that ``rows`` makes logits of.
    """
    same = token.shape[:2] == (1, 1)
    token = token.clamp_min(0)
    if rows is None:
        raw = states.index_select(-1, token[0, 0]) if same else states.gather(-1, token)
        return raw.float().masked_fill_(~wanted, -torch.inf)
    flat, token = states.flatten(0, 1), token.expand(wanted.shape).flatten(0, 1)
    row, column = wanted.flatten(0, 1).nonzero(as_tuple=True)
    out = torch.full(wanted.shape, -torch.inf, dtype=torch.float32, device=states.device).flatten(0, 1)
    out[row, column] = rows(flat, row, token[row, column])
    return out.view(wanted.shape)


def rank_by_scores(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Place int64 [R] of the item ``target`` [R] among scores [R, C], 1 is best; ties count against it."""
    return (scores >= scores.gather(1, target[:, None])).sum(1)


def rank_in_list(items: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Place int64 [R] of the item ``target`` [R] in lists of items [R, k], 1 is best, 0 where it is not in it."""
    return ((items == target[:, None]) * torch.arange(1, items.shape[1] + 1, device=items.device)).amax(1)
