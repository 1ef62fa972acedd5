"""What beam search and exhaustive scoring share: the two scorings, the normaliser over the vocabulary, a sort key, and
logits of a few tokens without those of the whole vocabulary."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch

import flr_kernels
from flr.data.trie import CatalogueTrie
from flr.model.forward import scale_logits

Scoring = Literal["full", "catalogue"]

_CACHED_CELLS = 1 << 18  # numbers worked on at a time on a CPU: 1 MiB, so that they stay in its cache
#: A number that is gathered and multiplied costs as much as this many multiply-adds of a matrix product: on a CPU measured; on
#: a GPU expected from 30 bytes at 3 TB/s against float32 products at 60 TFLOP/s.
_GATHER_COST = {"cpu": 40, "cuda": 300}


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


def check_vocabulary(trie: CatalogueTrie, vocabulary: int) -> None:
    if trie.max_token >= vocabulary:
        raise ValueError(f"the catalogue uses token {trie.max_token}, the model's vocabulary has {vocabulary}")


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """log sum exp over the vocabulary in float32, [..., V] -> [...]; on a CPU always from float32, a block of rows at a time."""
    rows = logits.reshape(-1, logits.shape[-1])
    if logits.device.type == "cpu" and rows.dtype != torch.float32:
        blocks = rows.split(max(1, _CACHED_CELLS // rows.shape[1]))
        return torch.cat([flr_kernels.log_normaliser(block.float()) for block in blocks]).view(logits.shape[:-1])
    return flr_kernels.log_normaliser(rows).float().view(logits.shape[:-1])


class HeadRows:
    """Logits of chosen tokens from hidden states, in float32, reading the chosen rows of lm_head alone.

    Made by `of`, which says None where the lm_head is not an ordinary matrix in memory (quantised, sharded, adapted).
    """

    def __init__(self, lm: Any) -> None:
        module = lm.get_output_embeddings()
        self.lm, self.weight, self.bias = lm, module.weight, module.bias

    @classmethod
    def of(cls, lm: Any, hidden: torch.Tensor, logits: torch.Tensor) -> HeadRows | None:
        """Rows of `lm`, if they give the `logits` [B, V] that it computed itself from `hidden` [B, D]."""
        module = lm.get_output_embeddings()
        plain = type(module) is torch.nn.Linear and type(module.weight) in (torch.nn.Parameter, torch.Tensor)
        if not plain or module.weight.shape != (logits.shape[-1], hidden.shape[-1]):
            return None
        rows = cls(lm)
        count, vocabulary = logits.shape
        token = torch.arange(0, vocabulary, max(1, vocabulary // 16), device=logits.device).repeat(count)
        row = torch.arange(count, device=logits.device).repeat_interleave(len(token) // max(count, 1))
        theirs = logits[row, token].float()
        error = (rows(hidden, row, token) - theirs).abs().amax()
        return rows if bool(error <= 1e-2 * theirs.abs().amax().clamp_min(1e-6)) else None

    def __call__(self, hidden: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Logit of `token` int64 [n] after the state `row` int64 [n] of hidden [R, D], float32 [n].

        As a product with all different tokens where that is cheaper than a dot product for each.
        """
        hidden = hidden.float()
        if len(token):
            different, column = token.unique(return_inverse=True)
            if len(hidden) * len(different) < _GATHER_COST.get(hidden.device.type, 40) * len(token):
                logits = hidden @ self.weight[different].float().T
                return self.finish(logits[row, column], token)
        cells = _CACHED_CELLS if hidden.device.type == "cpu" else 1 << 26
        blocks = (x.split(max(1, cells // hidden.shape[1])) for x in (row, token))
        parts = [(hidden[r] * self.weight[t].float()).sum(-1) for r, t in zip(*blocks, strict=True)]
        return self.finish(torch.cat(parts) if parts else hidden.new_empty(0), token)

    def over(self, token: torch.Tensor) -> TokenRows:
        """The rows of the tokens int64 [U], copied once."""
        return TokenRows(self, self.weight[token], token)

    def finish(self, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            logits = logits + self.bias[token].float()
        return scale_logits(self.lm, logits)


class TokenRows:
    """From hidden [..., D] to the logits of some tokens, float32 [..., U], by one product in the model's dtype."""

    def __init__(self, rows: HeadRows, weight: torch.Tensor, token: torch.Tensor) -> None:
        self.rows, self.weight, self.token = rows, weight, token

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.rows.finish(torch.nn.functional.linear(hidden, self.weight).float(), self.token)


def token_logits(
    states: torch.Tensor, rows: HeadRows | None, token: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Logits float32 [B, w, c] of `token` int64 [B, w, c] or [1, 1, c] where `wanted` bool [B, w, c], else -inf; new memory.

    `states` are logits [B, w, V], or the hidden states [B, w, D] that `rows` makes logits of.
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
