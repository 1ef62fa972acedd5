"""Runs of tokens without alternative under ``full``: read in one forward, scored token by token.

Between two levels at which some hypothesis of the batch branches, every hypothesis has one child at each level, so no
beam is chosen and none is born: the levels between can be read together, and the result is that of reading them one by
one. An item that ends in between ranks among the best of its step, since the step has no more continuations than beams.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flr.data.trie import CatalogueTrie
from flr_kernels import Continuations

from .filters import ItemFilter
from .scoring import log_normaliser
from .session import Session, last_states, slots

_MAX_LOGITS = 1 << 26  # of one forward, 256 MiB in float32; a longer run is read in several


class Run(NamedTuple):
    """What B users' hypotheses [B, w], whose last token has not been read, read up to the next branching of any."""

    size: int  # tokens without alternative that follow, at most
    first: torch.Tensor  # int64 [B, w], an allowed leaf position below
    ends: torch.Tensor  # int64 [B, w], depth of the one item below; past all depths where there are several
    live: torch.Tensor  # bool [B, w]


def next_run(trie: CatalogueTrie, allows: ItemFilter, running: Continuations, depth: int, vocabulary: int) -> Run:
    """The run that hypotheses at ``depth`` have in common; its size is 0 where one of them branches there."""
    live = running.score != -torch.inf
    first = allows.first(trie.leaf_begin[running.node].long()).clamp_max(trie.num_items - 1)
    last = allows.last(trie.leaf_end[running.node].long())
    start = torch.full_like(first, depth)
    branching = torch.where(live, trie.common_depth(first, torch.where(live, last, first), start), trie.depth + 1)
    single = live & (first == last)
    ends = torch.where(single, trie.lengths[first].long(), trie.depth + 1)
    nearest, longest = branching.masked_fill(single, trie.depth + 1).min(), branching.masked_fill(~single, 0).max()
    # where no hypothesis branches, the last token of the longest item is left to the next choice
    until = int(torch.where(nearest <= trie.depth, nearest, longest - 1))
    room = _MAX_LOGITS // max(1, live.numel() * vocabulary) - 1
    return Run(max(0, min(until - depth, room)), first, ends, live)


class Read(NamedTuple):
    """Hypotheses behind a run."""

    running: Continuations  # [B, w] that go on; the others' score is -inf
    complete: Continuations  # [B, w] that ended an item in the run; the others' score is -inf
    states: torch.Tensor  # [B, w, V] after those that go on
    broken: torch.Tensor  # bool [B], a logit on the way was NaN or infinite


def read_run(
    trie: CatalogueTrie, run: Run, running: Continuations, depth: int, session: Session, columns: int | None = None
) -> Read:
    """Read the last token of hypotheses at ``depth`` and the run behind it, in one step of the session.

    Args:
        columns: of that step, at least as many as a user has tokens to read; None: as many as the most have.
    """
    lengths = (run.ends - depth).clamp_max(run.size + 1) * run.live  # an item's last token need not be read
    owner, offset = slots(lengths, int(lengths.sum(1).max()) if columns is None else columns)
    ends, place, used = run.ends.gather(1, owner), depth + offset.clamp_min(0), offset >= 0
    leaf = run.first.gather(1, owner)
    states = session.step(trie.tokens[trie.ancestor(leaf, place)].long(), running.parent, lengths, every=True)
    norm = log_normaliser(states)  # [B, n]
    forced = trie.ancestor(leaf, torch.minimum(ends, place + 1).clamp_max(trie.depth))  # what must follow a column
    raw = states.gather(-1, trie.tokens[forced].long()[..., None])[..., 0].float()
    steps = torch.arange(run.size, device=leaf.device)
    begin = (lengths.cumsum(1) - lengths)[..., None]
    gain = (raw - norm).gather(1, (begin + steps).clamp_max(owner.shape[1] - 1).flatten(1)).view(*lengths.shape, -1)
    inside = depth + 1 + steps <= run.ends[..., None]
    score = running.score
    for step in range(run.size):  # in this order, as one by one
        score = torch.where(inside[..., step], gain[..., step] + score, score)
    broken = (~norm.isfinite() & used).any(1)
    done = run.live & (run.ends <= depth + run.size)
    end = trie.ancestor(run.first, torch.minimum(run.ends, torch.full_like(run.ends, depth + run.size)))
    node = torch.where(run.live, end, running.node)
    complete = running._replace(node=node, score=score.masked_fill(~done, -torch.inf))
    go_on = running._replace(node=node, score=score.masked_fill(done, -torch.inf))
    return Read(go_on, complete, last_states(states, lengths), broken)
