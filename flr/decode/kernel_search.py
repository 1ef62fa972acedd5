"""Beam search by kernels: what lies between two forwards of the model is three launches, and the rows of lm_head.

    trie_advance    what hypotheses read next, and which columns may be looked at
    (the model)
    trie_step       their children, scores, the best
    trie_collect    items that were completed, hypotheses that can still enter the best k

``flr_kernels.reference`` defines the three; the choices are those of :class:`flr.decode.search.Search`, with which the
tests compare them. The first and the last are two launches and not one since the model and the lm_head lie between them
on one side, and on the other the end of a level: there the host looks how far a search is, drops hypotheses and users,
reads the ends of items in one forward, or goes on from a level that was captured.
"""

from __future__ import annotations

from typing import Any

import torch

import flr_kernels
from flr.model.head import TokenRows
from flr_kernels import Continuations, TrieStep

from .packed import PackedSession
from .scoring import log_normaliser
from .search import BeamResult, Plan, Search, State
from .session import Session


class KernelSearch(Search):
    """Arguments as of ``Search``."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.columns = self.trie.tokens
        self.logits: TokenRows | None = None
        if self.head_rows is not None:  # logits of the catalogue's tokens instead of the vocabulary's
            tokens, self.columns = self.trie.columns()
            self.logits = self.head_rows.over(tokens)
        self._scale: torch.Tensor | None = None

    @property
    def scale(self) -> torch.Tensor:
        """float32 [depth + 1], what the log-probability of an item of so many tokens is divided by."""
        if self._scale is None:
            length = torch.arange(self.trie.depth + 1, device=self.trie.device).clamp_min(1)
            self._scale = length.float() ** self.length_penalty
        return self._scale

    def forward(self, state: State, session: Session, step: int, plan: Plan | None, tokens: int | None) -> None:
        if plan is None and step and isinstance(session, PackedSession):
            self.advance(state, session, step, state.running.node.shape[1])
        else:
            super().forward(state, session, step, plan, tokens)

    def advance(self, state: State, session: PackedSession, step: int, columns: int) -> None:
        """The model reads what leads to the hypotheses, ``columns`` tokens a user; whatever they are, nothing waits.

        More to read than there is room for is noted in ``state.overflow``.
        """
        trie, running, more = self.trie, state.running, {}
        if self.skips_forced:
            more = {**self.allows.flat(len(running.node))._asdict(), "keys": trie.node_key, "deepest": trie.depth}
        way = flr_kernels.trie_advance(
            running.score, running.node, running.parent, session.sees, session.depth, session.next_position[:, 0],
            state.overflow, trie.tokens, trie.leaf_begin, trie.leaf_end, trie.lengths, columns=columns, **more,
        )  # fmt: skip
        state.overflow = way.overflow
        if self.skips_forced:
            state.running, state.depth = running._replace(node=way.node), way.depth
        if not columns:
            return
        after = session.read(way.tokens, way.positions, way.seen, way.sees, way.depth)
        if self.skips_forced:
            after = after.flatten(0, 1)[way.last]
        if self.skips_forced and step == 0:
            after = torch.where((way.lengths > 0)[..., None], after, state.states)
        state.states = after

    def level(self, state: State, step: int) -> bool:
        trie, (open_width, width) = self.trie, self.widths(step)
        chosen = self._choose(state.states, state.running, step, open_width, width)
        length = trie.depth if self.length_penalty > 0 else min(step + 2, trie.depth)
        found = flr_kernels.trie_collect(
            *state.best, state.broken, chosen.invalid, chosen.unfinished, chosen.all, trie.children, trie.leaf_begin,
            trie.leaf_end, trie.items, trie.lengths, self.scale, depth=step + 1, longest=length,
            unique=self.skips_forced, **self.allows.flat(len(state.broken))._asdict(),
        )  # fmt: skip
        state.best, state.broken, state.left = BeamResult(found.items, found.scores), found.broken, found.left
        if open_width:
            state.running = chosen.unfinished._replace(score=found.score)
        return open_width > 0

    def _choose(
        self, states: torch.Tensor, running: Continuations, step: int, num_beams: int, complete_width: int
    ) -> TrieStep:
        trie = self.trie
        logits = states if self.logits is None else self.logits(states)
        norm = log_normaliser(logits) if self.scoring == "full" else None
        widest = max(trie.max_fanout[step:]) if self.skips_forced else trie.max_fanout[step]
        return flr_kernels.trie_step(
            logits, running.score, running.node, trie.children, self.columns, trie.leaf_begin, trie.leaf_end,
            num_unfinished=num_beams, num_all=complete_width, norm=norm, unique=self.skips_forced, widest=widest,
            **self.allows.flat(len(states))._asdict(),
        )  # fmt: skip
