"""Beam search under ``aggregation="mixture"``: a hypothesis carries K log-weights.

    w_k(h) = log g_k + Σ_s log p(h_s | thought_k, h_<s)            the score of h is logsumexp_k w_k(h)

A child c of h has w_k(hc) = w_k(h) + log p(c | thought_k, h), so softmax(w(h)) are the factors' posterior weights. What
is chosen is the best by the mixture's probability: W >= C beams are exact. Each p is normalised for itself, over the
vocabulary or over the children that lead to allowed items; tokens without alternative leave the weights as they are.
"""

from __future__ import annotations

import torch

from flr.data.trie import CatalogueTrie
from flr_kernels import Continuations

from .filters import ItemFilter
from .prompts import Prompts
from .scoring import Scoring
from .search import BeamResult, Candidates, Search, best_of
from .session import Session
from .ways import Ways


def mixed_search(
    found: Ways,
    trie: CatalogueTrie,
    allows: ItemFilter,
    num_beams: int,
    k: int,
    scoring: Scoring,
    length_penalty: float,
) -> BeamResult:
    """The k best items by the mixture of K ways; arguments as of :func:`flr.decode.beam.beam_search`."""
    assert found.log_weights is not None
    first = found.prompts[0]
    search = _MixedSearch(trie, allows, num_beams, k, scoring, length_penalty, first.head_rows)
    search.weights = found.log_weights.float()[:, None]
    states = torch.cat([way.states for way in found.prompts], -1)
    session = _SideBySide([way.session for way in found.prompts])
    return search.run(Prompts(states, session, first.head_rows, first.vocabulary))


class _SideBySide:
    """K sessions of the same hypotheses, whose states stand side by side, [B, w, K · X]; see ``Session``."""

    def __init__(self, sessions: list[Session]) -> None:
        self.sessions = sessions

    def step(self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat([session.step(tokens, parents, lengths) for session in self.sessions], -1)

    def tree(self, tokens: object, parents: object, depths: object) -> torch.Tensor:
        raise NotImplementedError("tree: the ways of a mixture are scored one by one")

    def select(self, users: torch.Tensor) -> None:
        for session in self.sessions:
            session.select(users)


class _MixedSearch(Search):
    """States are those of K ways, [B, w, K · X]."""

    weights: torch.Tensor  # [B, w', K], w_k of the hypotheses, of which the first w are left

    def select(self, users: torch.Tensor) -> None:
        super().select(users)
        self.weights = self.weights[users]

    def expand(
        self, states: torch.Tensor, running: Continuations, step: int, num_beams: int, complete_width: int
    ) -> tuple[Continuations | None, Continuations | None, torch.Tensor]:
        ways, width = self.weights.shape[-1], running.score.shape[1]
        dead = running.score == -torch.inf
        weights = self.weights[:, :width].masked_fill(dead[..., None], -torch.inf)
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
