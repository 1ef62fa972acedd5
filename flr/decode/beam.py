"""Beam search that can only emit items of a catalogue.

One step: every hypothesis' children in the trie are gathered, those without an allowed item below them are dropped, the
rest is scored and the best W go on. Nothing loops over beams or users; on CUDA the host waits for the device once every
few steps, to see whether anything is left to do.

Semantics, those of transformers' `generate(num_beams=W, early_stopping="never")` under a prefix constraint:
  * a continuation that completes an item is kept if it ranks among the best max(W, k) of all continuations of the step,
    it takes no beam from the unfinished ones, of which the best W go on;
  * the search ends when no unfinished hypothesis can still enter the best k.
So with W >= C it is exact. Two scorings, each exact for what it defines:
  full       sum of log softmax over the whole vocabulary, at every token of the item
  catalogue  the same with the softmax over the node's children that lead to allowed items: probabilities over the
             allowed items sum to 1, and an item is complete as soon as its prefix is unique (the rest has log 1 = 0)
Ties: among continuations the smaller leaf position (lexicographically smaller tokens) wins, among items the smaller index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .filters import ItemFilter, item_filter
from .scoring import Scoring, check_scoring, check_vocabulary, log_normaliser, order_key
from .session import Session, evaluating, num_prompts, start
from .trie import CatalogueTrie

_MAX_CANDIDATES = 1 << 21  # continuations held at a time; a wider fan-out is worked off in blocks of columns
_SYNC_EVERY = 4  # steps, where the host would have to wait for the device
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
) -> BeamResult:
    """The k best items for each user's prompt.

    The model is run in eval mode (restored afterwards); its `generation_config` is not looked at. The caller chunks
    users: memory is that of the prompt's cache plus B·W·V logits.

    Args:
        model: causal LM of transformers, patched or not.
        inputs: of the prompts: input_ids int64 [B, L] padded on the left, attention_mask, position_ids and whatever
            else the model takes at its prefill, e.g. a processor's output.
        trie: the catalogue; moved to the model's device if it is elsewhere (keep it there when calling often).
        num_beams: W >= 1.
        k: how many items to return; more than W may not all be found.
        scoring: "full" or "catalogue".
        allowed: bool [C] or [B, C]: items that may be given; None allows all.
        length_penalty: scores are divided by (tokens of the item) ** length_penalty.
        exclude: int64 [B, E] items that may not be given, padded with -1.

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
        logits, session = start(model, inputs, reserve=trie.depth)
        check_vocabulary(trie, logits)
        trie = trie.to(logits.device)
        allows = item_filter(trie, len(logits), allowed, exclude)
        return _search(logits, session, trie, allows, num_beams, k, scoring, length_penalty)


def _nothing(rows: int, k: int, device: torch.device) -> BeamResult:
    return BeamResult(
        torch.full((rows, k), -1, dtype=torch.int64, device=device),
        torch.full((rows, k), -torch.inf, dtype=torch.float32, device=device),
    )


def _search(
    logits: torch.Tensor,
    session: Session,
    trie: CatalogueTrie,
    allows: ItemFilter,
    num_beams: int,
    k: int,
    scoring: Scoring,
    length_penalty: float,
) -> BeamResult:
    rows, device = len(logits), logits.device
    root = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    anything = allows.count(root, torch.full_like(root, trie.num_items)) > 0
    running = _Continuations(
        torch.zeros_like(root, dtype=torch.float32).masked_fill(~anything, -torch.inf), root, root, root
    )
    best = _nothing(rows, k, device)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    logits = logits[:, None]
    for level in range(trie.depth):
        beam_width = min(num_beams, trie.num_internal[level + 1])
        complete_width = max(num_beams, k) if scoring == "catalogue" or trie.num_leaves[level + 1] else 0
        beams, complete, invalid = _expand(logits, running, trie, allows, level, beam_width, complete_width, scoring)
        broken |= invalid
        if complete is not None:
            best = _collect(best, complete, trie, allows, length_penalty)
        if beams is None:
            break
        bound = beams.score
        if length_penalty != 0.0:  # the best score a descendant can have: its log-probability cannot rise
            length = trie.depth if length_penalty > 0 else level + 2
            bound = bound / float(length) ** length_penalty
        hopeless = bound < best.scores[:, -1:]
        running = beams._replace(score=beams.score.masked_fill(hopeless, -torch.inf))
        if _sync_is_free(device) or (level + 1) % _SYNC_EVERY == 0:
            alive = int((running.score != -torch.inf).sum(1).max()) if rows else 0
            if alive == 0:
                break
            # sorted by score: what is dead or hopeless stands at the end
            running = _Continuations(*(x[:, :alive] for x in running))
        logits = session.step(trie.tokens[running.node.clamp_min(1)].long(), running.parent)
    if bool(broken):
        raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
    return best


def _expand(
    logits: torch.Tensor,
    running: _Continuations,
    trie: CatalogueTrie,
    allows: ItemFilter,
    level: int,
    num_beams: int,
    complete_width: int,
    scoring: Scoring,
) -> tuple[_Continuations | None, _Continuations | None, torch.Tensor]:
    """Best unfinished and best finished continuations of `running` [B, w] (none where their width is 0), and whether a
    live hypothesis has no finite normaliser."""
    rows, width = running.node.shape
    live = running.score != -torch.inf
    begin = trie.children[running.node].long()
    fanout = (trie.children[running.node + 1] - begin).masked_fill(~live, 0)
    widest = trie.max_fanout[level]
    if _sync_is_free(fanout.device) and fanout.numel():
        widest = int(fanout.max())
    block = max(1, _MAX_CANDIDATES // max(1, rows * width))
    starts = range(0, max(widest, 1), block)

    def children(first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nodes, allowed items below them and log-probability before normalisation, [B, w, columns] each."""
        column = torch.arange(first, min(first + block, max(widest, 1)), device=logits.device)
        inside = column < fanout[..., None]
        node = torch.where(inside, begin[..., None] + column, 0)
        count = allows.count(trie.leaf_begin[node].long(), trie.leaf_end[node].long()).masked_fill(~inside, 0)
        raw = logits.gather(-1, trie.tokens[node].long().clamp_min(0)).float()
        return node, count, raw.masked_fill(count == 0, -torch.inf)

    first_block = children(0)
    if scoring == "full":
        norm = log_normaliser(logits)
    else:
        norm = torch.logsumexp(first_block[2], dim=-1)
        for first in starts[1:]:
            norm = torch.logaddexp(norm, torch.logsumexp(children(first)[2], dim=-1))
    invalid = (live & ~norm.isfinite()).any()

    beams: _Continuations | None = None
    complete: _Continuations | None = None
    for first in starts:
        node, count, raw = first_block if first == 0 else children(first)
        score = running.score[..., None] + (raw - norm[..., None])
        score = score.masked_fill(count == 0, -torch.inf)
        key = order_key(score, trie.leaf_begin[node].long()).masked_fill(score == -torch.inf, _DEAD)
        parent = torch.arange(width, device=node.device)[:, None].expand_as(node)
        every = _Continuations(*(x.flatten(1) for x in (score, node, parent, key)))
        if num_beams:
            ends = _is_complete(every.node, trie, allows, scoring)
            beams = _best(beams, every._replace(key=every.key.masked_fill(ends, _DEAD)), num_beams)
        if complete_width:  # picked among all, then the unfinished struck out
            complete = _best(complete, every, complete_width)
    if beams is not None:
        beams = beams._replace(score=beams.score.masked_fill(beams.key == _DEAD, -torch.inf))
    if complete is not None:
        unfinished = ~_is_complete(complete.node, trie, allows, scoring) | (complete.key == _DEAD)
        complete = complete._replace(score=complete.score.masked_fill(unfinished, -torch.inf))
    return beams, complete, invalid


def _is_complete(node: torch.Tensor, trie: CatalogueTrie, allows: ItemFilter, scoring: Scoring) -> torch.Tensor:
    """Whether a node [B, n] stands for an item: a leaf, or under `catalogue` with one allowed item below."""
    if scoring == "full":
        return trie.children[node] == trie.children[node + 1]
    return allows.count(trie.leaf_begin[node].long(), trie.leaf_end[node].long()) == 1


def _best(so_far: _Continuations | None, more: _Continuations, width: int) -> _Continuations:
    """The `width` largest by key, in order."""
    if so_far is not None:
        more = _Continuations(*(torch.cat(pair, dim=1) for pair in zip(so_far, more, strict=True)))
    key, index = more.key.topk(min(width, more.key.shape[1]), dim=1)
    return _Continuations(more.score.gather(1, index), more.node.gather(1, index), more.parent.gather(1, index), key)


def _collect(
    best: BeamResult, complete: _Continuations, trie: CatalogueTrie, allows: ItemFilter, length_penalty: float
) -> BeamResult:
    """Merge finished continuations into the best items so far."""
    found = complete.score != -torch.inf
    # a unique prefix leads to the one allowed leaf below it; a leaf node to itself
    leaf = allows.first(trie.leaf_begin[complete.node].long()).clamp_max(trie.num_items - 1)
    score = complete.score
    if length_penalty != 0.0:
        score = score / trie.lengths[leaf].float() ** length_penalty
    items = torch.cat([best.items, torch.where(found, trie.items[leaf].long(), -1)], dim=1)
    scores = torch.cat([best.scores, torch.where(found, score, -torch.inf)], dim=1)
    key = order_key(scores, items.clamp_min(0)).masked_fill(scores == -torch.inf, _DEAD)
    index = key.topk(best.items.shape[1], dim=1).indices
    return BeamResult(items.gather(1, index), scores.gather(1, index))
