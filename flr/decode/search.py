"""A beam search over the trie, level by level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flr.data.trie import CatalogueTrie
from flr.model.head import HeadRows
from flr_kernels import Continuations
from flr_kernels.order import order_key

from .filters import ItemFilter
from .prompts import Prompts
from .runs import Run, next_run, read_run
from .scoring import Scoring, log_normaliser, token_logits
from .session import Session, slots
from .watch import Watch

_MAX_CANDIDATES = 1 << 21  # continuations held at a time; a wider fan-out is worked off in blocks of columns
#: Users that have finished leave the batch (a copy of the others' cache) when at most this share is left.
_LEAVE_BELOW = 0.75
_DEAD = torch.iinfo(torch.int64).min


class BeamResult(NamedTuple):
    """items int64 [B, k] by descending score, -1 past the end; scores float32 [B, k], -inf past the end."""

    items: torch.Tensor
    scores: torch.Tensor


def _sync_is_free(device: torch.device) -> bool:
    return device.type == "cpu"


def nothing_found(rows: int, k: int, device: torch.device) -> BeamResult:
    return BeamResult(
        torch.full((rows, k), -1, dtype=torch.int64, device=device),
        torch.full((rows, k), -torch.inf, dtype=torch.float32, device=device),
    )


@dataclass
class State:
    """Where a search of B users stands: w hypotheses each, sorted by score."""

    running: Continuations  # [B, w]
    depth: torch.Tensor  # int64 [B, w'], tokens of the previous step's hypotheses
    states: torch.Tensor  # [B, w, …] of the model after the hypotheses; of the previous step's until ``forward``
    best: BeamResult  # [B, k], items found so far
    broken: torch.Tensor  # bool [B], a choice had to be made among NaN or infinite logits
    overflow: torch.Tensor  # bool [B], a step of fixed size had more tokens to read than it has room for
    left: torch.Tensor | None = None  # int64 [B, 3] as of ``flr_kernels.trie_collect``, where that made the step

    def of(self, users: torch.Tensor) -> State:
        """Those of some users."""
        running, best = _rows(self.running, users), _rows(self.best, users)
        return State(running, self.depth[users], self.states[users], best, self.broken[users], self.overflow[users])


class Plan(NamedTuple):
    """The way of hypotheses [B, w] to their next branching, under ``catalogue``."""

    node: torch.Tensor  # int64, the branching
    depth: torch.Tensor  # int64, tokens before
    lengths: torch.Tensor  # int64, tokens to read
    first: torch.Tensor  # int64, an allowed leaf position below


class Search:
    """What a search asks of trie, filter and model, a level at a time.

    ``allows`` and ``struck`` shrink to the users that are not finished. What ``struck`` does not allow is not given but
    keeps its part of what ``catalogue`` normalises over. This is the search in PyTorch; on a GPU
    :class:`flr.decode.kernel_search.KernelSearch` makes the same choices.
    """

    def __init__(
        self,
        trie: CatalogueTrie,
        allows: ItemFilter,
        num_beams: int,
        k: int,
        scoring: Scoring,
        length_penalty: float,
        head_rows: HeadRows | None,
        struck: ItemFilter | None = None,
    ) -> None:
        self.trie, self.allows, self.struck, self.num_beams, self.k = trie, allows, struck, num_beams, k
        self.scoring, self.length_penalty, self.head_rows = scoring, length_penalty, head_rows
        self.skips_forced = scoring == "catalogue"  # tokens without alternative

    def begin(self, states: torch.Tensor) -> State:
        """At the root, after prompts whose states are [B, …]."""
        count, device = len(states), states.device
        root = torch.zeros(count, 1, dtype=torch.int64, device=device)
        items = self.allows.count(root, torch.full_like(root, self.trie.num_items))
        score = torch.zeros_like(root, dtype=torch.float32).masked_fill(items == 0, -torch.inf)
        score = self.strike(score, root)
        best, no = nothing_found(count, self.k, device), torch.zeros(count, dtype=torch.bool, device=device)
        if self.skips_forced:
            single = items == 1  # nothing to choose
            only = Continuations(score.masked_fill(~single, -torch.inf), root, root, root)
            best, score = self._collect(best, only), score.masked_fill(single, -torch.inf)
        return State(Continuations(score, root, root, root), root, states[:, None], best, no, no)

    def run(self, prompts: Prompts) -> BeamResult:
        """The whole search; fewer hypotheses and fewer users as it goes on, where the host need not wait to know."""
        session, count, device = prompts.session, len(prompts.states), prompts.states.device
        state, watch = self.begin(prompts.states), Watch()
        result, users = state.best, torch.arange(count, device=device)
        host_knows = _sync_is_free(device) or self.skips_forced
        broken = torch.zeros((), dtype=torch.bool, device=device)
        step = 0
        while step < self.trie.depth:
            plan, tokens = self.plan(state) if self.skips_forced else None, None
            if step or plan is not None:
                numbers = self.numbers(state, plan)
                known = numbers.tolist() if host_knows else watch.ask(numbers)
                if known is not None and known[0] == 0:
                    break
                if host_knows and known is not None:
                    alive, left, tokens = known
                    # sorted by score: what is dead or hopeless stands at the end
                    state.running = Continuations(*(x[:, :alive] for x in state.running))
                    plan = plan and Plan(*(x[:, :alive] for x in plan))
                    if left <= _LEAVE_BELOW * len(users):
                        result, broken = _put(result, users, state.best), broken | state.broken.any()
                        unfinished = (state.running.score != -torch.inf).any(1).nonzero()[:, 0]
                        users, plan, state = users[unfinished], plan and _rows(plan, unfinished), state.of(unfinished)
                        self.select(unfinished)
                        session.select(unfinished)
            run = None
            if step and session.reads_runs and not self.skips_forced and _sync_is_free(device):
                run = next_run(self.trie, self.allows, state.running, step, prompts.vocabulary)
            if run is not None and run.size:
                self.read(state, session, step, run)
                step += run.size
            else:
                self.forward(state, session, step, plan, tokens)
            if not self.level(state, step):
                break
            step += 1
        if bool(broken | state.broken.any()):
            raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
        return _put(result, users, state.best)

    def finish(self, state: State, session: Session, depth: int, vocabulary: int) -> State:
        """The rest of a search under ``full`` from hypotheses of ``depth`` tokens on, runs of tokens in one forward."""
        while depth < self.trie.depth:
            run = next_run(self.trie, self.allows, state.running, depth, vocabulary)
            if run.size:
                self.read(state, session, depth, run)
                depth += run.size
            else:
                self.forward(state, session, depth, None, None)
            depth += 1
            if not self.level(state, depth - 1) or not bool((state.running.score != -torch.inf).any()):
                break
        return state

    def select(self, users: torch.Tensor) -> None:
        """Go on with the users of these rows alone."""
        self.allows = self.allows.select(users)
        self.struck = None if self.struck is None else self.struck.select(users)

    def strike(self, score: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """``score`` [B, …], -inf at nodes (int64, of a shape that expands to it) below which all items are struck."""
        if self.struck is None:
            return score
        begin, end = (x[node].long().expand(score.shape) for x in (self.trie.leaf_begin, self.trie.leaf_end))
        return score.masked_fill(self.struck.count(begin, end) == 0, -torch.inf)

    def numbers(self, state: State, plan: Plan | None) -> torch.Tensor:
        """int64 [3]: the most live hypotheses of a user, users with one, the most tokens a user has to read next."""
        each = (state.running.score != -torch.inf).sum(1)
        tokens = each if plan is None else plan.lengths.sum(1)
        return torch.stack([each.amax(), (each > 0).sum(), tokens.amax()])

    def plan(self, state: State) -> Plan:
        """How hypotheses get to their next branching; tokens without alternative have log-probability 0."""
        trie, running = self.trie, state.running
        live = running.score != -torch.inf
        depth = state.depth.gather(1, running.parent)
        first = self.allows.first(trie.leaf_begin[running.node].long()).clamp_max(trie.num_items - 1)
        last = self.allows.last(trie.leaf_end[running.node].long())
        branching = torch.where(live, trie.common_depth(first, last, depth), depth)
        node = torch.where(live, trie.ancestor(first, branching), running.node)
        return Plan(node, depth, branching - depth, first)

    def forward(self, state: State, session: Session, step: int, plan: Plan | None, tokens: int | None) -> None:
        """The model reads what leads to the hypotheses.

        That is nothing at the root, a token each, or under ``catalogue`` the way to the next branching.
        """
        trie, running = self.trie, state.running
        if plan is None:
            if step:
                state.states = session.step(trie.tokens[running.node.clamp_min(1)].long(), running.parent)
            return
        assert tokens is not None
        state.running, state.depth = running._replace(node=plan.node), plan.depth + plan.lengths
        if tokens:
            owner, offset = slots(plan.lengths, tokens)
            leaf, depth = plan.first.gather(1, owner), plan.depth.gather(1, owner)
            node = trie.ancestor(leaf, (depth + 1 + offset.clamp_min(0)).minimum(state.depth.gather(1, owner)))
            after = session.step(trie.tokens[node.clamp_min(1)].long(), running.parent, plan.lengths)
            state.states = torch.where((plan.lengths > 0)[..., None], after, state.states) if step == 0 else after
        state.overflow = state.overflow | (plan.lengths.sum(1) > tokens)

    def read(self, state: State, session: Session, step: int, run: Run, columns: int | None = None) -> None:
        """The model reads hypotheses' last tokens and the run that follows; items that end in it are collected.

        ``columns``: see :func:`flr.decode.runs.read_run`.
        """
        state.running, complete, state.states, broken = read_run(self.trie, run, state.running, step, session, columns)
        state.broken = state.broken | broken
        state.best = self._collect(state.best, complete)

    def level(self, state: State, step: int) -> bool:
        """Choose among the hypotheses' children; False where no longer item can exist."""
        beams, complete, invalid = self.expand(state.states, state.running, step, *self.widths(step))
        state.broken = state.broken | invalid
        if complete is not None:
            state.best = self._collect(state.best, complete)
        if beams is None:
            return False
        bound = beams.score
        if self.length_penalty != 0.0:  # the best score a descendant can have: its log-probability cannot rise
            length = self.trie.depth if self.length_penalty > 0 else step + 2
            bound = bound / float(length) ** self.length_penalty
        hopeless = bound < state.best.scores[:, -1:]
        state.running = beams._replace(score=beams.score.masked_fill(hopeless, -torch.inf))
        return True

    def widths(self, step: int) -> tuple[int, int]:
        """How many unfinished and finished continuations step ``step`` keeps; 0 where the trie has none to give."""
        if self.skips_forced:  # branchings may lie at any greater depth
            return min(self.num_beams, sum(self.trie.num_internal[step + 1 :])), max(self.num_beams, self.k)
        finished = max(self.num_beams, self.k) if self.trie.num_leaves[step + 1] else 0
        return min(self.num_beams, self.trie.num_internal[step + 1]), finished

    def expand(
        self, states: torch.Tensor, running: Continuations, step: int, num_beams: int, complete_width: int
    ) -> tuple[Continuations | None, Continuations | None, torch.Tensor]:
        """Best unfinished and best finished continuations of ``running`` [B, w]; None where their width is 0.

        Third, bool [B], which users have a live hypothesis without finite normaliser.
        """
        candidates = Candidates(self, states, running, step)
        first_block = candidates.block(0)
        norm, invalid = candidates.normaliser(first_block[2])
        shift = norm[..., None]

        beams: Continuations | None = None
        complete: Continuations | None = None
        for start in candidates.starts:
            node, ends, score = candidates.block(start) if start else first_block
            score = score.sub_(shift).add_(running.score[..., None])  # token_logits made it for us alone
            score = self.strike(score, node)
            if complete_width:  # picked among all, then the unfinished struck out
                complete = best_of(complete, self.pick(score, node, complete_width), complete_width)
            if num_beams:
                if ends is not None:
                    score = score.masked_fill_(ends, -torch.inf)
                beams = best_of(beams, self.pick(score, node, num_beams), num_beams)
        return beams, self._finished(complete), invalid

    def _finished(self, complete: Continuations | None) -> Continuations | None:
        """Those that end an item alone."""
        if complete is None:
            return None
        return complete._replace(score=complete.score.masked_fill(~self._is_complete(complete.node), -torch.inf))

    def pick(self, score: torch.Tensor, node: torch.Tensor, count: int) -> Continuations:
        """The ``count`` best continuations of score [B, w, c], in order; node [B, w, c], or [1, 1, c]."""
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
        return best_of(None, Continuations(chosen, node, parent, key), count)

    def _is_complete(self, node: torch.Tensor) -> torch.Tensor:
        """Whether a node [B, n] stands for an item: a leaf, or under ``catalogue`` with one allowed item below."""
        trie = self.trie
        if self.scoring == "full":
            return trie.children[node] == trie.children[node + 1]
        return self.allows.count(trie.leaf_begin[node].long(), trie.leaf_end[node].long()) == 1

    def _collect(self, best: BeamResult, complete: Continuations) -> BeamResult:
        """Merge finished continuations into the best items so far."""
        trie = self.trie
        is_item = complete.score != -torch.inf
        leaf = trie.leaf_begin[complete.node].long()
        if self.skips_forced:  # a unique prefix leads to the one allowed leaf below it
            leaf = self.allows.first(leaf).clamp_max(trie.num_items - 1)
        score = complete.score
        if self.length_penalty != 0.0:
            score = score / trie.lengths[leaf].float() ** self.length_penalty
        items = torch.cat([best.items, torch.where(is_item, trie.items[leaf].long(), -1)], dim=1)
        scores = torch.cat([best.scores, torch.where(is_item, score, -torch.inf)], dim=1)
        key = order_key(scores, items.clamp_min(0)).masked_fill(scores == -torch.inf, _DEAD)
        index = key.topk(best.items.shape[1], dim=1).indices
        return BeamResult(items.gather(1, index), scores.gather(1, index))


def _rows(tensors: Any, rows: torch.Tensor) -> Any:
    return type(tensors)(*(x[rows] for x in tensors))


def _put(result: BeamResult, users: torch.Tensor, best: BeamResult) -> BeamResult:
    """``best`` in the rows ``users``; the same where those are all."""
    if len(users) == len(result.items):
        return best
    return BeamResult(*(all_.index_copy(0, users, own) for all_, own in zip(result, best, strict=True)))


def best_of(so_far: Continuations | None, more: Continuations, width: int) -> Continuations:
    """The ``width`` largest by key, in order."""
    if so_far is not None:
        more = Continuations(*(torch.cat(pair, dim=1) for pair in zip(so_far, more, strict=True)))
    key, index = more.key.topk(min(width, more.key.shape[1]), dim=1)
    return Continuations(more.score.gather(1, index), more.node.gather(1, index), more.parent.gather(1, index), key)


class Candidates:
    """Children of the hypotheses [B, w] of a step, a block of columns at a time."""

    def __init__(self, search: Search, states: torch.Tensor, running: Continuations, step: int) -> None:
        self.search, self.states, trie = search, states, search.trie
        self.live = running.score != -torch.inf
        self.begin = trie.children[running.node].long()
        self.fanout = (trie.children[running.node + 1] - self.begin).masked_fill(~self.live, 0)
        sync_is_free = _sync_is_free(states.device)
        if search.skips_forced or sync_is_free:
            widest = int(self.fanout.max()) if self.fanout.numel() else 0
        else:
            widest = trie.max_fanout[step]
        self.widest = max(widest, 1)
        self.size = max(1, _MAX_CANDIDATES // max(1, running.node.numel()))
        self.starts = range(0, self.widest, self.size)
        self.all_at_root = sync_is_free and step == 0 and not running.node.any()  # its children are looked up once
        self.may_end = search.scoring == "catalogue" or trie.num_leaves[step + 1] > 0

    def normaliser(self, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the hypotheses' log-probabilities are normalised by [B, w], 0 for dead ones; ``first`` is of block 0.

        Second, bool [B], which users have a live hypothesis without a finite one.
        """
        if self.search.scoring == "full":
            norm = log_normaliser(self.states)
        else:
            norm = torch.logsumexp(first, dim=-1)
            for start in self.starts[1:]:
                norm = torch.logaddexp(norm, torch.logsumexp(self.block(start)[2], dim=-1))
        return norm.masked_fill(~self.live, 0.0), (self.live & ~norm.isfinite()).any(1)

    def block(self, start: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Nodes, whether they end an item (None if none does), log-probabilities before normalisation: [B, w, columns].

        The first two are [1, 1, columns] or [B, 1, columns] where all hypotheses are at the root.
        """
        search, trie = self.search, self.search.trie
        column = torch.arange(start, min(start + self.size, self.widest), device=self.states.device)
        if self.all_at_root:
            node, inside = column[None, None] + 1, self.live[..., None]
        else:
            inside = column < self.fanout[..., None]
            node = torch.where(inside, self.begin[..., None] + column, 0)
        ends: torch.Tensor | None = None
        if self.may_end and not search.skips_forced:
            ends = trie.children[node] == trie.children[node + 1]
        if search.skips_forced or not search.allows.all:
            users = len(self.live)
            low, high = (x[node].long().expand(users, -1, -1) for x in (trie.leaf_begin, trie.leaf_end))
            count = search.allows.count(low, high)
            inside = inside & (count > 0)
            if search.skips_forced:
                ends = count == 1
        else:
            inside = inside.expand(-1, -1, len(column))
        return node, ends, token_logits(self.states, search.head_rows, trie.tokens[node].long(), inside)
