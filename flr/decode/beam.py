"""Beam search that can only emit items of a catalogue.

One step: every hypothesis' children in the trie are gathered, those without an allowed item below them are dropped, the
rest is scored and the best W go on. Nothing loops over beams or users.

Two scorings, each exact for what it defines:
  full       sum of log softmax over the whole vocabulary, at every token of the item
  catalogue  the same with the softmax over the node's children that lead to allowed items: probabilities over the
             allowed items sum to 1
Semantics are those of transformers' `generate(num_beams=W, early_stopping="never")` under a prefix constraint:
  * a continuation that completes an item is kept if it ranks among the best max(W, k) of all continuations of the step,
    it takes no beam from the unfinished ones, of which the best W go on;
  * the search ends when no unfinished hypothesis can still enter the best k.
So with W >= C it is exact. A step of `full` is a token. A step of `catalogue` leads from branching to branching of the trie
of allowed items: tokens without alternative have log-probability 0, the model reads them together with the next choice,
and an item is complete where nothing else can follow. Its logits are computed for the children alone.
Ties: among continuations the smaller leaf position (lexicographically smaller tokens) wins, among items the smaller index.

The host waits for the device once every few steps of `full`, to see whether anything is left to do, and once a step of
`catalogue`, for the number of tokens of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .filters import ItemFilter, item_filter
from .scoring import HeadRows, Scoring, check_scoring, check_vocabulary, log_normaliser, order_key, token_logits
from .session import Prompts, Session, evaluating, num_prompts, slots, start
from .trie import CatalogueTrie

_MAX_CANDIDATES = 1 << 21  # continuations held at a time; a wider fan-out is worked off in blocks of columns
_SYNC_EVERY = 4  # steps of `full`, where the host would have to wait for the device
_LEAVE_BELOW = (
    0.75  # users that have finished leave the batch (a copy of the others' cache) when at most these are left
)
_DEAD = torch.iinfo(torch.int64).min


class BeamResult(NamedTuple):
    """items int64 [B, k] by descending score, -1 past the end; scores float32 [B, k], -inf past the end."""

    items: torch.Tensor
    scores: torch.Tensor


class _Continuations(NamedTuple):
    """Children of all hypotheses of a user that made it into a selection, best first; [B, n] each."""

    score: torch.Tensor  # float32, -inf for none
    node: torch.Tensor  # int64
    parent: torch.Tensor  # int64 column of the hypothesis it continues
    key: torch.Tensor  # int64 order key, _DEAD for none


def _sync_is_free(device: torch.device) -> bool:
    return device.type == "cpu"


@torch.no_grad()
def beam_search(
    model: nn.Module,
    inputs: Mapping[str, Any],
    trie: CatalogueTrie,
    num_beams: int = 20,
    k: int = 10,
    scoring: Scoring = "full",
    allowed: torch.Tensor | None = None,
    length_penalty: float = 0.0,
    exclude: torch.Tensor | None = None,
    *,
    only: torch.Tensor | None = None,
    categories: torch.Tensor | None = None,
    wanted: torch.Tensor | int | None = None,
) -> BeamResult:
    """The k best items for each user's prompt.

    The model is run in eval mode (restored afterwards); its `generation_config` is not looked at. The caller chunks
    users: memory is that of the prompt's cache plus, in `full`, B·W·V logits.

    Args:
        model: causal LM of transformers, patched or not.
        inputs: of the prompts: input_ids int64 [B, L] padded on the left, attention_mask, position_ids and whatever
            else the model takes at its prefill, e.g. a processor's output.
        trie: the catalogue; moved to the model's device if it is elsewhere (keep it there when calling often).
        num_beams: W >= 1.
        k: how many items to return; more than W may not all be found.
        scoring: "full" or "catalogue".
        allowed, exclude, only, categories, wanted: which items may be given, see `item_filter`; None allows all.
        length_penalty: scores are divided by (tokens of the item) ** length_penalty.

    Returns:
        BeamResult of items int64 [B, k] and scores float32 [B, k] (log-probabilities when length_penalty is 0). An item
        whose probability is 0 is not returned. A user without allowed items gets -1 throughout.

    Raises:
        ValueError: an argument out of range, prompts padded on the right, a token outside the model's vocabulary.
        FloatingPointError: the model gave NaN or infinite logits where a choice had to be made.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    >>> trie = CatalogueTrie.from_sequences([5, 7, 5, 8, 6], [0, 2, 4, 5])    # items (5, 7), (5, 8), (6,)
    >>> found = beam_search(model, {"input_ids": torch.tensor([[1, 2, 3]])}, trie, num_beams=3, k=4)
    >>> sorted(found.items[0].tolist())
    [-1, 0, 1, 2]
    """
    check_scoring(scoring)
    if num_beams < 1 or k < 1:
        raise ValueError(f"num_beams and k must be at least 1, got {num_beams} and {k}")
    if num_prompts(inputs) == 0:
        return _nothing(0, k, inputs["input_ids"].device)
    with evaluating(model):
        prompts = start(model, inputs, reserve=trie.depth, want_hidden=scoring == "catalogue")
        check_vocabulary(trie, prompts.vocabulary)
        device = prompts.states.device
        trie = trie.to(device)
        allows = item_filter(trie, len(prompts.states), allowed, exclude, only, categories, wanted)
        found = _Search(trie, allows, num_beams, k, scoring, length_penalty, prompts.rows).run(prompts)
    return found


def _nothing(rows: int, k: int, device: torch.device) -> BeamResult:
    return BeamResult(
        torch.full((rows, k), -1, dtype=torch.int64, device=device),
        torch.full((rows, k), -torch.inf, dtype=torch.float32, device=device),
    )


class _Search:
    """One search; `allows` shrinks to the users that are not finished."""

    def __init__(
        self,
        trie: CatalogueTrie,
        allows: ItemFilter,
        num_beams: int,
        k: int,
        scoring: Scoring,
        length_penalty: float,
        rows: HeadRows | None,
    ) -> None:
        self.trie, self.allows, self.num_beams, self.k = trie, allows, num_beams, k
        self.scoring, self.length_penalty, self.rows = scoring, length_penalty, rows
        self.skips = scoring == "catalogue"  # tokens without alternative

    def run(self, prompts: Prompts) -> BeamResult:
        trie, session, count = self.trie, prompts.session, len(prompts.states)
        device = prompts.states.device
        root = torch.zeros(count, 1, dtype=torch.int64, device=device)
        items = self.allows.count(root, torch.full_like(root, trie.num_items))
        score = torch.zeros_like(root, dtype=torch.float32).masked_fill(items == 0, -torch.inf)
        running, depth, states = _Continuations(score, root, root, root), root, prompts.states[:, None]
        result = best = _nothing(count, self.k, device)
        users = torch.arange(count, device=device)
        if self.skips:
            single = items == 1  # nothing to choose
            best = self._collect(best, running._replace(score=score.masked_fill(~single, -torch.inf)))
            running = running._replace(score=score.masked_fill(single, -torch.inf))
            running, depth, states = self._advance(running, root, session, states)
        broken = torch.zeros((), dtype=torch.bool, device=device)
        free = _sync_is_free(device)
        for step in range(trie.depth):
            beam_width, complete_width = self._widths(step)
            beams, complete, invalid = self._expand(states, running, step, beam_width, complete_width)
            broken |= invalid
            if complete is not None:
                best = self._collect(best, complete)
            if beams is None:
                break
            bound = beams.score
            if self.length_penalty != 0.0:  # the best score a descendant can have: its log-probability cannot rise
                length = trie.depth if self.length_penalty > 0 else step + 2
                bound = bound / float(length) ** self.length_penalty
            hopeless = bound < best.scores[:, -1:]
            running = beams._replace(score=beams.score.masked_fill(hopeless, -torch.inf))
            if free or self.skips or (step + 1) % _SYNC_EVERY == 0:
                each = (running.score != -torch.inf).sum(1)
                alive, left = torch.stack([each.amax(), (each > 0).sum()]).tolist()
                if alive == 0:
                    break
                # sorted by score: what is dead or hopeless stands at the end
                running = _Continuations(*(x[:, :alive] for x in running))
                if left <= _LEAVE_BELOW * len(users):
                    result = _put(result, users, best)
                    stay = each.nonzero()[:, 0]
                    users, depth, self.allows = users[stay], depth[stay], self.allows.select(stay)
                    running, best = _Continuations(*(x[stay] for x in running)), BeamResult(*(x[stay] for x in best))
                    session.select(stay)
            if self.skips:
                running, depth, states = self._advance(running, depth, session)
            else:
                states = session.step(trie.tokens[running.node.clamp_min(1)].long(), running.parent)
        if bool(broken):
            raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
        return _put(result, users, best)

    def _widths(self, step: int) -> tuple[int, int]:
        """How many unfinished and finished continuations step `step` keeps; 0 where the trie has none to give."""
        if self.skips:  # branchings may lie at any greater depth
            return min(self.num_beams, sum(self.trie.num_internal[step + 1 :])), max(self.num_beams, self.k)
        finished = max(self.num_beams, self.k) if self.trie.num_leaves[step + 1] else 0
        return min(self.num_beams, self.trie.num_internal[step + 1]), finished

    def _advance(
        self, running: _Continuations, depth: torch.Tensor, session: Session, states: torch.Tensor | None = None
    ) -> tuple[_Continuations, torch.Tensor, torch.Tensor]:
        """Lead hypotheses to their next branching: with its node, its depth [B, w], and the states there.

        `depth` [B, w'] is that of the previous step's hypotheses; `states` those at the start, for which nothing need be read.
        """
        trie = self.trie
        live = running.score != -torch.inf
        depth = depth.gather(1, running.parent)
        first = self.allows.first(trie.leaf_begin[running.node].long()).clamp_max(trie.num_items - 1)
        last = self.allows.last(trie.leaf_end[running.node].long())
        joined = torch.where(live, trie.join(first, last, depth), depth)
        running = running._replace(node=torch.where(live, trie.ancestor(first, joined), running.node))
        lengths = joined - depth
        count = int(lengths.sum(1).max())
        if count:
            owner, offset = slots(lengths, count)
            node = trie.ancestor(first.gather(1, owner), depth.gather(1, owner) + 1 + offset.clamp_min(0))
            after = session.step(trie.tokens[node.clamp_min(1)].long(), running.parent, lengths)
            states = after if states is None else torch.where((lengths > 0)[..., None], after, states)
        assert states is not None, "a continuation has at least one token"
        return running, joined, states

    def _expand(
        self, states: torch.Tensor, running: _Continuations, step: int, num_beams: int, complete_width: int
    ) -> tuple[_Continuations | None, _Continuations | None, torch.Tensor]:
        """Best unfinished and best finished continuations of `running` [B, w] (none where their width is 0), and whether
        a live hypothesis has no finite normaliser."""
        trie = self.trie
        rows, width = running.node.shape
        live = running.score != -torch.inf
        begin = trie.children[running.node].long()
        fanout = (trie.children[running.node + 1] - begin).masked_fill(~live, 0)
        free = _sync_is_free(fanout.device)
        if self.skips or free:
            widest = int(fanout.max()) if fanout.numel() else 0
        else:
            widest = trie.max_fanout[step]
        widest = max(widest, 1)
        block = max(1, _MAX_CANDIDATES // max(1, rows * width))
        starts = range(0, widest, block)
        alike = free and step == 0 and not running.node.any()  # all at the root: its children are looked up once
        may_end = self.scoring == "catalogue" or trie.num_leaves[step + 1] > 0

        def children(at: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
            """Nodes, whether they end an item (None if none does), log-probability before normalisation: [B, w, columns],
            the first two [1, 1, columns] or [B, 1, columns] where all are at the root."""
            column = torch.arange(at, min(at + block, widest), device=states.device)
            if alike:
                node, inside = column[None, None] + 1, live[..., None]
                low, high = (x[node].long().expand(rows, 1, -1) for x in (trie.leaf_begin, trie.leaf_end))
            else:
                inside = column < fanout[..., None]
                node = torch.where(inside, begin[..., None] + column, 0)
                low, high = (x[node].long() for x in (trie.leaf_begin, trie.leaf_end))
            count = self.allows.count(low, high)
            ends: torch.Tensor | None = None
            if may_end:
                ends = count == 1 if self.scoring == "catalogue" else trie.children[node] == trie.children[node + 1]
            return node, ends, token_logits(states, self.rows, trie.tokens[node].long(), inside & (count > 0))

        first_block = children(0)
        if self.scoring == "full":
            norm = log_normaliser(states)
        else:
            norm = torch.logsumexp(first_block[2], dim=-1)
            for at in starts[1:]:
                norm = torch.logaddexp(norm, torch.logsumexp(children(at)[2], dim=-1))
        invalid = (live & ~norm.isfinite()).any()
        shift = norm.masked_fill(~live, 0.0)[..., None]

        beams: _Continuations | None = None
        complete: _Continuations | None = None
        for at in starts:
            node, ends, score = first_block if at == 0 else children(at)
            score = score.sub_(shift).add_(running.score[..., None])  # token_logits made it for us alone
            if complete_width:  # picked among all, then the unfinished struck out
                complete = _best(complete, self._pick(score, node, complete_width), complete_width)
            if num_beams:
                if ends is not None:
                    score = score.masked_fill_(ends, -torch.inf)
                beams = _best(beams, self._pick(score, node, num_beams), num_beams)
        if complete is not None:
            unfinished = ~self._is_complete(complete.node) | (complete.key == _DEAD)
            complete = complete._replace(score=complete.score.masked_fill(unfinished, -torch.inf))
        return beams, complete, invalid

    def _pick(self, score: torch.Tensor, node: torch.Tensor, count: int) -> _Continuations:
        """The `count` best continuations of score [B, w, c], in order; node [B, w, c], or [1, 1, c]."""
        columns, flat = score.shape[-1], score.flatten(1)
        count = min(count, flat.shape[1])
        index: torch.Tensor | None = None
        if _sync_is_free(score.device) and count < flat.shape[1]:
            # by score alone, which is cheaper than by key: right unless the last place is shared
            top = flat.topk(count + 1, dim=1)
            if not ((top.values[:, -1] == top.values[:, -2]) & (top.values[:, -1] != -torch.inf)).any():
                index = top.indices[:, :-1]
        if index is None:
            key = order_key(score, self.trie.leaf_begin[node].long()).masked_fill(score == -torch.inf, _DEAD)
            index = key.flatten(1).topk(count, dim=1).indices
        chosen, parent = flat.gather(1, index), index // columns
        if node.shape[:2] == (1, 1):
            node = node[0, 0][index % columns]
        else:
            node = node.flatten(1).gather(1, index)
        key = order_key(chosen, self.trie.leaf_begin[node].long()).masked_fill(chosen == -torch.inf, _DEAD)
        return _best(None, _Continuations(chosen, node, parent, key), count)

    def _is_complete(self, node: torch.Tensor) -> torch.Tensor:
        """Whether a node [B, n] stands for an item: a leaf, or under `catalogue` with one allowed item below."""
        trie = self.trie
        if self.scoring == "full":
            return trie.children[node] == trie.children[node + 1]
        return self.allows.count(trie.leaf_begin[node].long(), trie.leaf_end[node].long()) == 1

    def _collect(self, best: BeamResult, complete: _Continuations) -> BeamResult:
        """Merge finished continuations into the best items so far."""
        trie = self.trie
        found = complete.score != -torch.inf
        # a unique prefix leads to the one allowed leaf below it; a leaf node to itself
        leaf = self.allows.first(trie.leaf_begin[complete.node].long()).clamp_max(trie.num_items - 1)
        score = complete.score
        if self.length_penalty != 0.0:
            score = score / trie.lengths[leaf].float() ** self.length_penalty
        items = torch.cat([best.items, torch.where(found, trie.items[leaf].long(), -1)], dim=1)
        scores = torch.cat([best.scores, torch.where(found, score, -torch.inf)], dim=1)
        key = order_key(scores, items.clamp_min(0)).masked_fill(scores == -torch.inf, _DEAD)
        index = key.topk(best.items.shape[1], dim=1).indices
        return BeamResult(items.gather(1, index), scores.gather(1, index))


def _put(result: BeamResult, users: torch.Tensor, best: BeamResult) -> BeamResult:
    """`best` in the rows `users`; the same where those are all."""
    if len(users) == len(result.items):
        return best
    return BeamResult(*(all_.index_copy(0, users, own) for all_, own in zip(result, best, strict=True)))


def _best(so_far: _Continuations | None, more: _Continuations, width: int) -> _Continuations:
    """The `width` largest by key, in order."""
    if so_far is not None:
        more = _Continuations(*(torch.cat(pair, dim=1) for pair in zip(so_far, more, strict=True)))
    key, index = more.key.topk(min(width, more.key.shape[1]), dim=1)
    return _Continuations(more.score.gather(1, index), more.node.gather(1, index), more.parent.gather(1, index), key)
