"""A beam search over the trie, level by level."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import flr_kernels
from flr.data.trie import CatalogueTrie
from flr.model.head import HeadRows, TokenRows
from flr_kernels import Continuations
from flr_kernels.order import order_key

from .filters import ItemFilter
from .prompts import Prompts
from .scoring import Scoring, log_normaliser, token_logits
from .session import Session, slots


class Watch:
    """Numbers that the device computes, as of the last step that is known to be done; the host does not wait for them."""

    def __init__(self) -> None:
        self.asked: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def ask(self, numbers: torch.Tensor) -> list[int] | None:
        """int64 [n] or those of an earlier call; None where nothing is known yet."""
        if numbers.device.type == "cpu":
            return numbers.tolist()
        host, event = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(numbers, non_blocking=True)
        event.record(torch.cuda.current_stream(numbers.device))
        self.asked.append((host, event))
        known: list[int] | None = None
        while self.asked and self.asked[0][1].query():
            known = self.asked.popleft()[0].tolist()
        return known


_MAX_CANDIDATES = 1 << 21  # continuations held at a time; a wider fan-out is worked off in blocks of columns


_LEAVE_BELOW = (
    0.75  # users that have finished leave the batch (a copy of the others' cache) when at most these are left
)


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
    states: torch.Tensor  # [B, w, …] of the model after the hypotheses; of the previous step's until `forward`
    best: BeamResult  # [B, k], items found so far
    broken: torch.Tensor  # bool [B], a choice had to be made among NaN or infinite logits
    overflow: torch.Tensor  # bool [B], a step of fixed size had more tokens to read than it has room for


class Plan(NamedTuple):
    """The way of hypotheses [B, w] to their next branching, under `catalogue`."""

    node: torch.Tensor  # int64, the branching
    depth: torch.Tensor  # int64, tokens before
    lengths: torch.Tensor  # int64, tokens to read
    first: torch.Tensor  # int64, an allowed leaf position below


class Search:
    """What a search asks of trie, filter and model, a level at a time; `allows` shrinks to the users that are not finished."""

    def __init__(
        self,
        trie: CatalogueTrie,
        allows: ItemFilter,
        num_beams: int,
        k: int,
        scoring: Scoring,
        length_penalty: float,
        rows: HeadRows | None,
        kernel: bool = False,
    ) -> None:
        self.trie, self.allows, self.num_beams, self.k = trie, allows, num_beams, k
        self.scoring, self.length_penalty, self.rows = scoring, length_penalty, rows
        self.skips = scoring == "catalogue"  # tokens without alternative
        self.kernel, self.columns = kernel, trie.tokens
        self.logits: TokenRows | None = None
        if kernel and rows is not None:  # logits of the catalogue's tokens instead of the vocabulary's
            tokens, self.columns = trie.columns()
            self.logits = rows.over(tokens)

    def begin(self, states: torch.Tensor) -> State:
        """At the root, after prompts whose states are [B, …]."""
        count, device = len(states), states.device
        root = torch.zeros(count, 1, dtype=torch.int64, device=device)
        items = self.allows.count(root, torch.full_like(root, self.trie.num_items))
        score = torch.zeros_like(root, dtype=torch.float32).masked_fill(items == 0, -torch.inf)
        best, no = nothing_found(count, self.k, device), torch.zeros(count, dtype=torch.bool, device=device)
        if self.skips:
            single = items == 1  # nothing to choose
            only = Continuations(score.masked_fill(~single, -torch.inf), root, root, root)
            best, score = self._collect(best, only), score.masked_fill(single, -torch.inf)
        return State(Continuations(score, root, root, root), root, states[:, None], best, no, no)

    def run(self, prompts: Prompts) -> BeamResult:
        """The whole search; fewer hypotheses and fewer users as it goes on, where the host need not wait to know."""
        session, count, device = prompts.session, len(prompts.states), prompts.states.device
        at, watch = self.begin(prompts.states), Watch()
        result, users = at.best, torch.arange(count, device=device)
        knows = _sync_is_free(device) or self.skips
        broken = torch.zeros((), dtype=torch.bool, device=device)
        for step in range(self.trie.depth):
            plan, tokens = self.plan(at) if self.skips else None, None
            if step or plan is not None:
                numbers = self.numbers(at, plan)
                known = numbers.tolist() if knows else watch.ask(numbers)
                if known is not None and known[0] == 0:
                    break
                if knows and known is not None:
                    alive, left, tokens = known
                    # sorted by score: what is dead or hopeless stands at the end
                    at.running = Continuations(*(x[:, :alive] for x in at.running))
                    plan = plan and Plan(*(x[:, :alive] for x in plan))
                    if left <= _LEAVE_BELOW * len(users):
                        result, broken = _put(result, users, at.best), broken | at.broken.any()
                        stay = (at.running.score != -torch.inf).any(1).nonzero()[:, 0]
                        users, self.allows, plan = users[stay], self.allows.select(stay), plan and _rows(plan, stay)
                        at = State(_rows(at.running, stay), at.depth[stay], at.states[stay], _rows(at.best, stay),
                                   at.broken[stay], at.overflow[stay])  # fmt: skip
                        session.select(stay)
            self.forward(at, session, step, plan, tokens)
            if not self.level(at, step):
                break
        if bool(broken | at.broken.any()):
            raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
        return _put(result, users, at.best)

    def numbers(self, at: State, plan: Plan | None) -> torch.Tensor:
        """int64 [3]: the most live hypotheses of a user, users that have one, the most tokens a user has to read next."""
        each = (at.running.score != -torch.inf).sum(1)
        tokens = each if plan is None else plan.lengths.sum(1)
        return torch.stack([each.amax(), (each > 0).sum(), tokens.amax()])

    def plan(self, at: State) -> Plan:
        """How hypotheses get to their next branching; tokens without alternative have log-probability 0."""
        trie, running = self.trie, at.running
        live = running.score != -torch.inf
        depth = at.depth.gather(1, running.parent)
        first = self.allows.first(trie.leaf_begin[running.node].long()).clamp_max(trie.num_items - 1)
        last = self.allows.last(trie.leaf_end[running.node].long())
        joined = torch.where(live, trie.join(first, last, depth), depth)
        node = torch.where(live, trie.ancestor(first, joined), running.node)
        return Plan(node, depth, joined - depth, first)

    def forward(self, at: State, session: Session, step: int, plan: Plan | None, tokens: int | None) -> None:
        """The model reads what leads to the hypotheses: nothing at the root, a token each, or under `catalogue` the way to the
        next branching, `tokens` of them a user."""
        trie, running = self.trie, at.running
        if plan is None:
            if step:
                at.states = session.step(trie.tokens[running.node.clamp_min(1)].long(), running.parent)
            return
        assert tokens is not None
        at.running, at.depth = running._replace(node=plan.node), plan.depth + plan.lengths
        if tokens:
            owner, offset = slots(plan.lengths, tokens)
            leaf, depth = plan.first.gather(1, owner), plan.depth.gather(1, owner)
            node = trie.ancestor(leaf, (depth + 1 + offset.clamp_min(0)).minimum(at.depth.gather(1, owner)))
            after = session.step(trie.tokens[node.clamp_min(1)].long(), running.parent, plan.lengths)
            at.states = torch.where((plan.lengths > 0)[..., None], after, at.states) if step == 0 else after
        at.overflow = at.overflow | (plan.lengths.sum(1) > tokens)

    def level(self, at: State, step: int) -> bool:
        """Choose among the hypotheses' children; False where no longer item can exist."""
        beams, complete, invalid = self.expand(at.states, at.running, step, *self.widths(step))
        at.broken = at.broken | invalid
        if complete is not None:
            at.best = self._collect(at.best, complete)
        if beams is None:
            return False
        bound = beams.score
        if self.length_penalty != 0.0:  # the best score a descendant can have: its log-probability cannot rise
            length = self.trie.depth if self.length_penalty > 0 else step + 2
            bound = bound / float(length) ** self.length_penalty
        hopeless = bound < at.best.scores[:, -1:]
        at.running = beams._replace(score=beams.score.masked_fill(hopeless, -torch.inf))
        return True

    def widths(self, step: int) -> tuple[int, int]:
        """How many unfinished and finished continuations step `step` keeps; 0 where the trie has none to give."""
        if self.skips:  # branchings may lie at any greater depth
            return min(self.num_beams, sum(self.trie.num_internal[step + 1 :])), max(self.num_beams, self.k)
        finished = max(self.num_beams, self.k) if self.trie.num_leaves[step + 1] else 0
        return min(self.num_beams, self.trie.num_internal[step + 1]), finished

    def expand(
        self, states: torch.Tensor, running: Continuations, step: int, num_beams: int, complete_width: int
    ) -> tuple[Continuations | None, Continuations | None, torch.Tensor]:
        """Best unfinished and best finished continuations of `running` [B, w] (none where their width is 0), and which users
        have a live hypothesis without finite normaliser, bool [B]."""
        if self.kernel:
            return self._expand_by_kernel(states, running, step, num_beams, complete_width)
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
            else:
                inside = column < fanout[..., None]
                node = torch.where(inside, begin[..., None] + column, 0)
            ends: torch.Tensor | None = None
            if may_end and not self.skips:
                ends = trie.children[node] == trie.children[node + 1]
            if self.skips or not self.allows.all:
                low, high = (x[node].long().expand(rows, -1, -1) for x in (trie.leaf_begin, trie.leaf_end))
                count = self.allows.count(low, high)
                inside = inside & (count > 0)
                if self.skips:
                    ends = count == 1
            else:
                inside = inside.expand(-1, -1, len(column))
            return node, ends, token_logits(states, self.rows, trie.tokens[node].long(), inside)

        first_block = children(0)
        if self.scoring == "full":
            norm = log_normaliser(states)
        else:
            norm = torch.logsumexp(first_block[2], dim=-1)
            for at in starts[1:]:
                norm = torch.logaddexp(norm, torch.logsumexp(children(at)[2], dim=-1))
        invalid = (live & ~norm.isfinite()).any(1)
        shift = norm.masked_fill(~live, 0.0)[..., None]

        beams: Continuations | None = None
        complete: Continuations | None = None
        for at in starts:
            node, ends, score = first_block if at == 0 else children(at)
            score = score.sub_(shift).add_(running.score[..., None])  # token_logits made it for us alone
            if complete_width:  # picked among all, then the unfinished struck out
                complete = _best(complete, self._pick(score, node, complete_width), complete_width)
            if num_beams:
                if ends is not None:
                    score = score.masked_fill_(ends, -torch.inf)
                beams = _best(beams, self._pick(score, node, num_beams), num_beams)
        return beams, self._finished(complete), invalid

    def _expand_by_kernel(
        self, states: torch.Tensor, running: Continuations, step: int, num_beams: int, complete_width: int
    ) -> tuple[Continuations | None, Continuations | None, torch.Tensor]:
        trie = self.trie
        logits = states if self.logits is None else self.logits(states)
        norm = log_normaliser(logits) if self.scoring == "full" else None
        kind, listed, offset, entries = self.allows.flat(len(states))
        found = flr_kernels.trie_step(
            logits, running.score, running.node, trie.children, self.columns, trie.leaf_begin, trie.leaf_end,
            num_unfinished=num_beams, num_all=complete_width, norm=norm, unique=self.skips, filter=kind, listed=listed,
            offset=offset, entries=entries, widest=max(trie.max_fanout[step:]) if self.skips else trie.max_fanout[step],
        )  # fmt: skip
        beams, complete = found.unfinished if num_beams else None, found.all if complete_width else None
        return beams, self._finished(complete), found.invalid

    def _finished(self, complete: Continuations | None) -> Continuations | None:
        """Those that end an item alone."""
        if complete is None:
            return None
        unfinished = ~self._is_complete(complete.node) | (complete.key == _DEAD)
        return complete._replace(score=complete.score.masked_fill(unfinished, -torch.inf))

    def _pick(self, score: torch.Tensor, node: torch.Tensor, count: int) -> Continuations:
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
        return _best(None, Continuations(chosen, node, parent, key), count)

    def _is_complete(self, node: torch.Tensor) -> torch.Tensor:
        """Whether a node [B, n] stands for an item: a leaf, or under `catalogue` with one allowed item below."""
        trie = self.trie
        if self.scoring == "full":
            return trie.children[node] == trie.children[node + 1]
        return self.allows.count(trie.leaf_begin[node].long(), trie.leaf_end[node].long()) == 1

    def _collect(self, best: BeamResult, complete: Continuations) -> BeamResult:
        """Merge finished continuations into the best items so far."""
        trie = self.trie
        found = complete.score != -torch.inf
        leaf = trie.leaf_begin[complete.node].long()
        if self.skips:  # a unique prefix leads to the one allowed leaf below it
            leaf = self.allows.first(leaf).clamp_max(trie.num_items - 1)
        score = complete.score
        if self.length_penalty != 0.0:
            score = score / trie.lengths[leaf].float() ** self.length_penalty
        items = torch.cat([best.items, torch.where(found, trie.items[leaf].long(), -1)], dim=1)
        scores = torch.cat([best.scores, torch.where(found, score, -torch.inf)], dim=1)
        key = order_key(scores, items.clamp_min(0)).masked_fill(scores == -torch.inf, _DEAD)
        index = key.topk(best.items.shape[1], dim=1).indices
        return BeamResult(items.gather(1, index), scores.gather(1, index))


def _rows(tensors: Any, rows: torch.Tensor) -> Any:
    return type(tensors)(*(x[rows] for x in tensors))


def _put(result: BeamResult, users: torch.Tensor, best: BeamResult) -> BeamResult:
    """`best` in the rows `users`; the same where those are all."""
    if len(users) == len(result.items):
        return best
    return BeamResult(*(all_.index_copy(0, users, own) for all_, own in zip(result, best, strict=True)))


def _best(so_far: Continuations | None, more: Continuations, width: int) -> Continuations:
    """The `width` largest by key, in order."""
    if so_far is not None:
        more = Continuations(*(torch.cat(pair, dim=1) for pair in zip(so_far, more, strict=True)))
    key, index = more.key.topk(min(width, more.key.shape[1]), dim=1)
    return Continuations(more.score.gather(1, index), more.node.gather(1, index), more.parent.gather(1, index), key)
