"""Beam search under ``aggregation="mixture"``: a hypothesis carries K log-weights.

    w_k(h) = log g_k + Σ_s log p(h_s | thought_k, h_<s)            the score of h is logsumexp_k w_k(h)

A child c of h has w_k(hc) = w_k(h) + log p(c | thought_k, h), so softmax(w(h)) are the factors' posterior weights. What
is chosen is the best by the mixture's probability: W >= C beams are exact. Each p is normalised for itself, over the
vocabulary or over the children that lead to allowed items; tokens without alternative leave the weights as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from flr_kernels import Continuations

from .search import Candidates, Search, best_of


class MixedSearch(Search):
    """States are those of K ways, [B, w, K · X]; other arguments as of ``Search``.

    Args:
        log_weights: [B, K], log g.
    """

    def __init__(self, log_weights: torch.Tensor, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.weights = log_weights.float()[:, None]  # [B, w', K], w_k of the hypotheses, of which the first w are left

    def select(self, users: torch.Tensor) -> None:
        super().select(users)
        self.weights = self.weights[users]

    def expand(
        self, states: torch.Tensor, running: Continuations, step: int, num_beams: int, complete_width: int
    ) -> tuple[Continuations | None, Continuations | None, torch.Tensor]:
        ways, width = self.weights.shape[-1], running.score.shape[1]
        weights = self.weights[:, :width]
        apart = states.unflatten(-1, (ways, -1)).flatten(1, 2)  # [B, w · K, X]
        each = Continuations(*(x.repeat_interleave(ways, 1) for x in running))
        candidates = Candidates(self, apart, each, step)
        first_block = candidates.block(0)
        norm, invalid = candidates.normaliser(first_block[2])
        beams: Continuations | None = None
        complete: Continuations | None = None
        for start in candidates.starts:
            node, ends, score = candidates.block(start) if start else first_block
            if node.shape[1] == width * ways:
                node, ends = node[:, ::ways], None if ends is None else ends[:, ::ways]
            score = score.sub_(norm[..., None]).unflatten(1, (width, ways)).add_(weights[..., None]).logsumexp(2)
            score = self.strike(score, node)
            if complete_width:
                complete = best_of(complete, self.pick(score, node, complete_width), complete_width)
            if num_beams:
                score = score if ends is None else score.masked_fill_(ends, -torch.inf)
                beams = best_of(beams, self.pick(score, node, num_beams), num_beams)
        if beams is not None:
            own = (weights - norm.unflatten(1, (width, ways))).gather(1, beams.parent[..., None].expand(-1, -1, ways))
            self.weights = own + self._logits(apart, beams, ways)
        return beams, self._finished(complete), invalid

    def _logits(self, apart: torch.Tensor, beams: Continuations, ways: int) -> torch.Tensor:
        """Logits [B, w, K] of the last token of ``beams`` after states [B, w' · K, X]."""
        token = self.trie.tokens[beams.node.clamp_min(1)].long()[..., None].expand(-1, -1, ways)
        row = beams.parent[..., None] * ways + torch.arange(ways, device=apart.device)
        user = torch.arange(len(apart), device=apart.device)[:, None, None]
        if self.head_rows is None:
            return apart[user, row, token].float()
        row = user * apart.shape[1] + row
        return self.head_rows(apart.flatten(0, 1), row.flatten(), token.flatten()).view(row.shape)
