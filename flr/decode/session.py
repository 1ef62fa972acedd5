"""A prompt encoded once, continued by many hypotheses at a time.

``prompts.prefill`` returns the states after the prompt (a patched model thinks inside this call) and a session that
continues from it. Two kinds, chosen by what the model can do:

``PackedSession``    The W hypotheses of a user are W tokens of one row. The prompt's keys and values exist once a user;
                     the hypotheses' own ones are appended behind them and never moved. Who sees what is a 4-D mask
                     [B, 1, W, L + columns], kept up to date from ancestor pointers, or prompt and own columns are two
                     calls (flash_attention_2). Needs one of these attentions (sdpa, eager, flash_attention_2),
                     position_ids, and no sliding window shorter than prompt plus item.
``ExpandedSession``  The cache is expanded to B·W rows and reordered, as transformers does it. Every attention can.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from flr.model.backbone import cache_of, causal_lm


class Session(Protocol):
    """The prompt of B users, continued by w hypotheses each (1 at the start: the prompt itself).

    States are logits [..., V] in the model's dtype or, where ``prefill`` was asked for them, hidden states [..., D].
    """

    reads_runs: bool  # whether ``step`` can give the states after every token

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        """Append tokens to w hypotheses a user.

        Args:
            tokens: int64 [B, n] tokens of the first new hypothesis, then of the second, …; padded at the end.
            parents: int64 [B, w] which hypothesis of the previous step (column, 0 at the first) each continues.
            lengths: int64 [B, w] how many tokens each adds, at most n a user; None for one each (n = w).
            every: with lengths, and where the session ``reads_runs``.

        Returns:
            states [B, w, …] after the last token of each; undefined where the length is 0. With ``every`` after each of
            the n tokens, [B, n, …], as :func:`slots` lays them out.
        """

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        """States [B, n, …] at n trie nodes behind the prompt, the same for all users; the session stays as it was.

        Args:
            tokens: int [n] last token of each node.
            parents: int [n] index of its parent among the n, -1 for the prompt; parents stand before children.
            depths: int [n] tokens from the prompt to the node, 1 for children of the root, ascending.
        """

    def select(self, users: torch.Tensor) -> None:
        """Go on with the users of these rows, int64 ascending, alone."""


@contextlib.contextmanager
def lm_head_inputs(model: nn.Module, skip: bool) -> Iterator[list[torch.Tensor]]:
    """What the lm_head is given inside, call by call; with ``skip`` it works on no row, and logits are empty.

    Other threads that use the model meanwhile are left alone.
    """
    seen: list[torch.Tensor] = []
    thread = threading.get_ident()

    def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if threading.get_ident() != thread:
            return None
        seen.append(args[0])
        return (args[0][:, :0], *args[1:]) if skip else None

    handle = causal_lm(model).get_output_embeddings().register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def model_states(model: nn.Module, hidden: bool, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, Cache]:
    """Hidden states [B, n, D] or logits [B, n, V] of the model's forward, and its cache."""
    if not hidden:
        out = model(**arguments, use_cache=True)
        return out.logits, cache_of(out)
    with lm_head_inputs(model, skip=True) as seen:
        out = model(**arguments, use_cache=True)
    return seen[-1], cache_of(out)


def refuse_every(every: bool) -> None:
    """ValueError where states after every token are asked of a session that does not read runs."""
    if every:
        raise ValueError("every: expected False where the last token's states alone are kept, got True")


def slots(lengths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Layout of ``lengths`` [B, w] tokens side by side in ``count`` columns.

    Returns whose a column is and the token's place in it, int64 [B, count]; past the end (w - 1, -1).

    >>> owner, offset = slots(torch.tensor([[2, 0, 1]]), 4)
    >>> owner.tolist(), offset.tolist()
    ([[0, 0, 2, 2]], [[0, 1, 0, -1]])
    """
    ends = lengths.cumsum(1)
    column = torch.arange(count, device=lengths.device).expand(len(lengths), -1).contiguous()
    owner = torch.searchsorted(ends, column, right=True).clamp_max(lengths.shape[1] - 1)
    offset = column - (ends - lengths).gather(1, owner)
    return owner, offset.masked_fill(column >= ends[:, -1:], -1)


def last_states(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """States [B, w, …] after the last of ``lengths`` [B, w] tokens each, of states [B, n, …] laid out by ``slots``."""
    place = (lengths.cumsum(1) - 1).clamp(0, states.shape[1] - 1)
    return states[torch.arange(len(states), device=states.device)[:, None], place]
