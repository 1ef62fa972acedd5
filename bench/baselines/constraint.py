"""One constrained beam step as it is done today: from logits of B·W beams to the best W continuations of every user.

Both take logits [B·W, V] and the beams' scores [B, W] and return scores, parents and tokens [B, W], best first. At the
root, where all beams of a user are one hypothesis, each has the rows that its code has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Best(NamedTuple):
    score: Tensor  # float32 [B, W], -inf for none
    parent: Tensor  # int64 [B, W] column of the beam that is continued
    token: Tensor  # int64 [B, W]


def _best_of_vocabulary(log_probs: Tensor, beam_scores: Tensor) -> Best:
    users, beams = beam_scores.shape
    vocabulary = log_probs.shape[-1]
    total = (log_probs.view(users, beams, vocabulary) + beam_scores[..., None]).view(users, beams * vocabulary)
    score, index = total.topk(2 * beams, dim=1)  # some may be complete items, so twice as many are taken
    score, index = score[:, :beams], index[:, :beams]
    return Best(score, index // vocabulary, index % vocabulary)


class PythonDict:
    """A dictionary from every prefix to its children, asked for each beam; the mask is filled beam by beam.

    The order is that of transformers' beam search (5.23, `generate` with `num_beams` and a `LogitsProcessor`):
    log_softmax of everything, the constraint on log-probabilities, the best 2 W of W·V, with W rows a user at the
    root, too. One log_softmax, where MiniOneRec's processor has a second one. Checked by `generate` itself:
    bench/test_decode.py compares the ranked lists of whole evaluations with ours, which are compared with this step.
    """

    def __init__(self, sequences: list[tuple[int, ...]]) -> None:
        children: dict[tuple[int, ...], set[int]] = {}
        for s in sequences:
            for step in range(len(s)):
                children.setdefault(s[:step], set()).add(s[step])
        self.children = {prefix: sorted(tokens) for prefix, tokens in children.items()}

    def constrain(self, input_ids: Tensor, prompt_length: int, log_probs: Tensor) -> Tensor:
        """log_probs [B·W, V] with -inf where no item goes on, after input_ids [B·W, prompt_length + step]."""
        mask = torch.full_like(log_probs, -math.inf)
        for beam, ids in enumerate(input_ids):
            allowed = self.children.get(tuple(ids[prompt_length:].tolist()))
            if allowed is not None:
                mask[beam, allowed] = 0
        return log_probs + mask

    def step(self, logits: Tensor, beam_scores: Tensor, input_ids: Tensor, prompt_length: int) -> Best:
        log_probs = torch.log_softmax(logits, dim=-1)
        return _best_of_vocabulary(self.constrain(input_ids, prompt_length, log_probs), beam_scores)


class Static:
    """STATIC (arXiv 2602.22647), after its published PyTorch code, youtube/static-constraint-decoding at d865c02.

    Every item is padded to the longest. At the root there is one row a user: log_softmax, a dense mask, the best W of
    V. Below it a fixed number of columns, the level's widest node, is read from CSR for every beam, and the best W of
    W times that many are taken. The published code can make the second level dense, too, by tables of V × V: for the
    few thousand codes it is meant for, not for a language model's tokens (151,936² are 23 GB of mask alone).

    Checked by running that code, with one dense level, on the same logits: whole beam searches over codes and over
    titles give the same sequences in the same order (docs/log.md, 2026-11-26).
    """

    def __init__(
        self, sequences: list[tuple[int, ...]], vocabulary: int, pad: int, device: torch.device | str = "cpu"
    ) -> None:
        longest = max(map(len, sequences))
        rows = torch.full((len(sequences), longest), pad, dtype=torch.int64)
        lengths = torch.tensor([len(s) for s in sequences])
        rows[torch.arange(longest) < lengths[:, None]] = torch.tensor([t for s in sequences for t in s])
        state = torch.zeros(len(rows), dtype=torch.int64)  # of each item, at the level
        self.first: list[Tensor] = []  # by level: edge where a state's children begin, [states + 1]
        self.tokens: list[Tensor] = []  # by level: token of each edge; the edge's number is the next state
        self.widest: list[int] = []
        for level in range(longest):
            edges, state_of_item = (state * vocabulary + rows[:, level]).unique(return_inverse=True)
            fanout = torch.bincount(edges // vocabulary, minlength=int(state.max()) + 1)
            self.first.append(torch.cat([fanout.new_zeros(1), fanout.cumsum(0)]))
            self.tokens.append(edges % vocabulary)
            self.widest.append(int(fanout.max()))
            state = state_of_item
        self.root_mask = torch.zeros(vocabulary, dtype=torch.bool)
        self.root_mask[self.tokens[0]] = True
        self.device_first = [x.to(device) for x in self.first]
        self.device_tokens = [x.to(device) for x in self.tokens]
        self.root_mask = self.root_mask.to(device)

    @property
    def num_edges(self) -> int:
        return sum(map(len, self.tokens))

    def state(self, prefix: tuple[int, ...]) -> int:
        """Number of the state that `prefix` leads to, within its level."""
        state = 0
        for level, token in enumerate(prefix):
            first, last = (int(x) for x in self.first[level][state : state + 2])
            state = first + int(torch.searchsorted(self.tokens[level][first:last], token))
        return state

    def root(self, logits: Tensor, beams: int) -> Best:
        """Of logits [B, V], a row a user, the best `beams` first tokens."""
        log_probs = torch.log_softmax(logits, dim=-1)
        score, token = torch.where(self.root_mask, log_probs, -math.inf).topk(beams, dim=-1)
        return Best(score, torch.zeros_like(token), token)

    def step(self, logits: Tensor, beam_scores: Tensor, states: Tensor, level: int) -> Best:
        """Below the root."""
        users, beams = beam_scores.shape
        log_probs = torch.log_softmax(logits, dim=-1)
        first, tokens = self.device_first[level], self.device_tokens[level]
        edge = first[states][:, None] + torch.arange(self.widest[level], device=logits.device)
        valid = edge < first[states + 1][:, None]
        token = tokens[edge.clamp_max(len(tokens) - 1)]
        score = log_probs.gather(1, token).masked_fill(~valid, -math.inf)
        total = (score.view(users, beams, -1) + beam_scores[..., None]).view(users, -1)
        best, index = total.topk(min(beams, total.shape[1]), dim=1)
        return Best(best, index // self.widest[level], token.view(users, -1).gather(1, index))
