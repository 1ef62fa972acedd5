"""Decoding for every member of a group behind the one prompt that a group forward has encoded.

The members' thoughts are hypotheses of one ``PackedSession``, and their beams continue them: B rows of
prompt, B·G·W hypotheses. To the search every member is a user of its own. Nothing is encoded again: not the prompt, not
the thoughts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flr.config import check_normalisation
from flr.data.trie import CatalogueTrie
from flr.model.backbone import evaluating
from flr.model.head import HeadRows, head
from flr.model.outputs import GroupPrompts
from flr_kernels.ops.trie_step.op import runs_as_kernel

from .filters import item_filter
from .kernel_search import KernelSearch
from .packed import PackedSession, obstacle
from .prompts import Prompts
from .scoring import Scoring, check_vocabulary, rank_by_scores, rank_in_list
from .search import Search
from .session import slots


class _Members:
    """A session of B·G users over one whose rows are B prompts; see ``Session``."""

    reads_runs = True

    def __init__(self, packed: PackedSession, batch: int, members: int) -> None:
        self.packed, self.shape, self.width = packed, (batch, members), 1
        self.left = torch.arange(batch * members, device=packed.depth.device)  # members that still search

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        members, width, columns = self.shape[1], parents.shape[1], tokens.shape[1]
        # hypotheses of a user: member by member
        first = torch.arange(members, device=tokens.device)[:, None] * self.width
        side_by_side = (self._everyone(parents).unflatten(0, self.shape) + first).flatten(1)  # [B, G·w]
        everyone = self._everyone(tokens)
        if lengths is None:
            tokens, taken = everyone.view(self.shape[0], -1), None
        else:
            each = self._everyone(lengths)
            taken = each.view(self.shape[0], -1)
            owner, offset = slots(taken, int(taken.sum(1).max()))
            begin = (each.cumsum(1) - each).view_as(taken).gather(1, owner)
            place = owner // width * everyone.shape[1] + begin + offset.clamp_min(0)
            tokens = everyone.view(self.shape[0], -1).gather(1, place)
        states = self.packed.step(tokens, side_by_side, taken, every=every)
        self.width = width
        if not every or taken is None:
            return states.view(-1, width, *states.shape[2:])[self.left]
        begin = (taken.cumsum(1) - taken).view(-1, width)[self.left, 0]  # [left], a member's first column of its row
        place = begin[:, None] + torch.arange(columns, device=begin.device)
        return states[(self.left // members)[:, None], place.clamp_max(states.shape[1] - 1)]

    def _everyone(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [B·G, …] of x, which has those of the members left; zeros for the others."""
        if len(x) == self.shape[0] * self.shape[1]:
            return x.contiguous()
        return x.new_zeros(self.shape[0] * self.shape[1], x.shape[1]).index_copy(0, self.left, x)

    def select(self, users: torch.Tensor) -> None:
        self.left = self.left[users]

    def tree(self, tokens: Any, parents: Any, depths: Any) -> torch.Tensor:
        raise NotImplementedError("tree: members are decoded by beam search")


@torch.no_grad()
def group_ranks(
    model: nn.Module,
    prompts: GroupPrompts,
    trie: CatalogueTrie,
    targets: torch.Tensor,
    num_beams: int = 20,
    scoring: Scoring = "full",
) -> torch.Tensor | None:
    """Place of each user's target in the list that constrained decoding gives each of its members.

    Exact for one-token catalogues (ties count against the target); else in the ``num_beams`` best of a beam search.

    Args:
        model: the causal LM, unwrapped. prompts: of a group forward. targets: int64 [B] items.

    Returns:
        int64 [B, G], 1 is best, 0 not in the list. None where the model's beams cannot be packed into rows.

    Raises:
        ValueError: as ``beam_search``. FloatingPointError: logits are NaN or infinite.
    """
    check_normalisation("scoring", scoring)
    if num_beams < 1:
        raise ValueError(f"num_beams: expected an integer >= 1, got {num_beams}")
    batch, members, size = prompts.hidden.shape
    thoughts = len(prompts.member) // members
    hidden = prompts.hidden.reshape(-1, size)
    target = targets.repeat_interleave(members)
    with evaluating(model):
        if trie.depth == 1:
            logits = head(model, hidden)
            check_vocabulary(trie, logits.shape[-1])
            trie = trie.to(logits.device)
            scores = logits[:, trie.tokens[1:].long()].float()[:, trie.leaf_of_item]
            if not bool(scores.isfinite().all()):
                raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
            return rank_by_scores(scores, target).view(batch, members)
        if obstacle(model, prompts.cache, prompts.attention_mask.shape[1] + thoughts + trie.depth) is not None:
            return None
        trie, head_rows, states = trie.to(hidden.device), None, hidden
        first = head(model, hidden[:1])
        check_vocabulary(trie, first.shape[-1])
        if scoring == "catalogue":
            head_rows = HeadRows.of(model, hidden[:1], first)
        if head_rows is None:
            states = head(model, hidden)
        prompt = {"attention_mask": prompts.attention_mask, "position_ids": prompts.position_ids}
        packed = PackedSession(model, prompts.cache, prompt, head_rows is not None)
        own = torch.arange(members, device=hidden.device)[:, None] == prompts.member
        for layer in packed.layers:
            layer.truncate(packed.length + len(prompts.member))
        packed.sees = own.expand(batch, -1, -1)
        packed.depth = packed.depth.new_full((batch, members), thoughts)
        begun = Prompts(states, _Members(packed, batch, members), head_rows, first.shape[-1])
        kind = KernelSearch if runs_as_kernel(states, num_beams) else Search
        search = kind(trie, item_filter(trie, len(states)), num_beams, num_beams, scoring, 0.0, head_rows)
        return rank_in_list(search.run(begun).items, target).view(batch, members)
