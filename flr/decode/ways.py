"""What a prompt is continued from: its one thought or, under ``aggregation="mixture"``, each of its K thoughts.

An item's probability is then Σ_k g_k p(item | thought_k). Scoring and search go K ways of the same kind, and what they
find is mixed: of a prompt of one thought there is one way, of weight 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from flr.model.backbone import causal_lm, mixes
from flr.model.batch import plain_pieces
from flr.model.factor_mixture import FactorStates, encode_factors
from flr.model.head import HeadRows, head

from .packed import PackedSession, obstacle
from .prompts import Prompts, prefill, prepare_inputs
from .session import Session, refuse_every, slots

_TAKEN = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")


class Ways(NamedTuple):
    """K ways on from the prompts of B users."""

    log_weights: torch.Tensor | None  # [B, K], log g; None for one way
    prompts: list[Prompts]  # K


def thoughts_apart(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[FactorStates, dict[str, Any]] | None:
    """Prompts and their K thoughts, encoded, and the prepared inputs; None where a prompt has no thought or one.

    Raises:
        ValueError: as :func:`flr.decode.prompts.prepare_inputs`, a thought in some rows alone, or inputs that a mixture
            does not take.
    """
    lm = causal_lm(model)
    if not mixes(lm) or inputs.get("thoughts") is not None:
        return None
    prepared = prepare_inputs(model, inputs)
    if odd := sorted(name for name, value in prepared.items() if name not in _TAKEN and value is not None):
        raise ValueError(f"inputs: expected {', '.join(_TAKEN)} with aggregation mixture, got {', '.join(odd)} too")
    ids = prepared["input_ids"]
    is_thought = ids == lm._flr_patch.config.thought_token_id
    if not bool(is_thought.any()):
        return None
    if not bool((is_thought[:, -1] & (is_thought.sum(1) == 1)).all()) or ids.shape[1] < 2:
        raise ValueError("input_ids: expected prompts that end with one thought token each, got others")
    embeds = lm.get_input_embeddings()(ids)
    mask, positions = prepared["attention_mask"], prepared["position_ids"]
    pieces = plain_pieces(embeds, mask, positions, is_thought, prepared.get("reasoner_mask"))
    pieces.ids = ids
    return encode_factors(lm, pieces, ids.shape[1] - 1, ids.shape[1]), prepared


def ways(model: nn.Module, inputs: Mapping[str, Any], reserve: int, want_hidden: bool = False) -> Ways:
    """As :func:`flr.decode.prompts.prefill`, once a thought."""
    apart = thoughts_apart(model, inputs)
    if apart is None:
        return Ways(None, [prefill(model, inputs, reserve, want_hidden)])
    states, prepared = apart
    if not _packs(model, states, reserve):
        return Ways(states.log_gates, _encoded_again(model, states, prepared, reserve, want_hidden))
    return Ways(states.log_gates, _packed(model, states, prepared, want_hidden))


def ways_together(
    model: nn.Module, inputs: Mapping[str, Any], reserve: int, want_hidden: bool = False
) -> tuple[torch.Tensor | None, Prompts]:
    """As :func:`ways`, but all K in one session, whose states stand side by side: [B, w, K · X]."""
    apart = thoughts_apart(model, inputs)
    if apart is None:
        return None, prefill(model, inputs, reserve, want_hidden)
    states, prepared = apart
    session: Session
    if _packs(model, states, reserve):
        lm, hidden = causal_lm(model), states.hidden[:, :, 0]
        after, rows, vocabulary = _after_thoughts(lm, hidden, want_hidden)
        session = _OneRow(model, states, prepared, rows is not None)
        return states.log_gates, Prompts(torch.cat(after, -1), session, rows, vocabulary)
    each = _encoded_again(model, states, prepared, reserve, want_hidden)
    session = _SideBySide([way.session for way in each])
    return states.log_gates, each[0]._replace(states=torch.cat([way.states for way in each], -1), session=session)


def _packs(model: nn.Module, states: FactorStates, reserve: int) -> bool:
    """Whether what follows the thoughts can go on from the prompts' cache."""
    members, longest = states.members, states.history.shape[1] + 1 + reserve
    return members.packed and members.cache is not None and obstacle(model, members.cache, longest) is None


def _encoded_again(
    model: nn.Module, states: FactorStates, prepared: Mapping[str, Any], reserve: int, want_hidden: bool
) -> list[Prompts]:
    """A prefill for each thought."""
    each = states.thoughts.unbind(1)
    return [prefill(model, {**prepared, "thoughts": x[:, None]}, reserve, want_hidden) for x in each]


def _after_thoughts(
    lm: Any, hidden: torch.Tensor, want_hidden: bool
) -> tuple[list[torch.Tensor], HeadRows | None, int]:
    """K states [B, …] from hidden states [B, K, D], how to make logits of them if they are none, and V."""
    logits = head(lm, hidden[:, 0])
    rows = HeadRows.of(lm, hidden[:, 0], logits) if want_hidden else None
    if rows is not None:
        return list(hidden.unbind(1)), rows, logits.shape[-1]
    return [logits, *(head(lm, x) for x in hidden[:, 1:].unbind(1))], None, logits.shape[-1]


def _packed(model: nn.Module, states: FactorStates, prepared: Mapping[str, Any], want_hidden: bool) -> list[Prompts]:
    """Ways that share the prompt's cache until their first step, each of which sees its own thought of it alone."""
    hidden, (count, factors) = states.hidden[:, :, 0], states.log_gates.shape
    after, rows, vocabulary = _after_thoughts(causal_lm(model), hidden, want_hidden)
    positions = prepared["position_ids"]
    positions = torch.cat([positions, positions[:, -1:].expand(-1, factors - 1)], 1)
    found, cache = [], states.members.cache
    assert cache is not None
    for k in range(factors):
        own = torch.arange(factors, device=hidden.device) == k
        mask = torch.cat([states.prompt.mask.bool(), own.expand(count, -1)], 1)
        session = PackedSession(model, cache, {"attention_mask": mask, "position_ids": positions}, rows is not None)
        found.append(Prompts(after[k], session, rows, vocabulary))
    return found


class _OneRow:
    """w hypotheses of K ways as K · w of one packed session behind the K thoughts; see ``Session``."""

    reads_runs = False

    def __init__(self, model: nn.Module, states: FactorStates, prepared: Mapping[str, Any], hidden: bool) -> None:
        cache, (users, self.factors) = states.members.cache, states.log_gates.shape
        assert cache is not None
        prompt = {"attention_mask": states.prompt.mask, "position_ids": prepared["position_ids"][:, :-1]}
        self.packed, self.width = PackedSession(model, cache, prompt, hidden), 1
        for layer in self.packed.layers:
            layer.truncate(self.packed.length + self.factors)  # the thoughts stand behind the prompts
        own = torch.eye(self.factors, dtype=torch.bool, device=states.history.device)
        self.packed.sees = own.expand(users, -1, -1)
        self.packed.depth = self.packed.depth.new_ones(users, self.factors)

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        refuse_every(every)
        first = torch.arange(self.factors, device=parents.device)[:, None] * self.width
        side_by_side = (parents[:, None] + first).flatten(1)  # [B, K · w], way by way
        taken = None if lengths is None else lengths.repeat(1, self.factors)
        if lengths is None or taken is None:
            tokens = tokens.repeat(1, self.factors)
        else:
            owner, offset = slots(taken, tokens.shape[1] * self.factors)
            begin = (lengths.cumsum(1) - lengths).gather(1, owner % lengths.shape[1])
            tokens = tokens.gather(1, (begin + offset.clamp_min(0)).clamp_max(tokens.shape[1] - 1))
        states = self.packed.step(tokens, side_by_side, taken)
        self.width = parents.shape[1]
        return states.unflatten(1, (self.factors, -1)).transpose(1, 2).flatten(2)

    def tree(self, tokens: Any, parents: Any, depths: Any) -> torch.Tensor:
        raise NotImplementedError("tree: ways are scored one by one")

    def select(self, users: torch.Tensor) -> None:
        self.packed.select(users)


class _SideBySide:
    """K sessions of the same hypotheses; see ``Session``."""

    reads_runs = False

    def __init__(self, sessions: list[Session]) -> None:
        self.sessions = sessions

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        refuse_every(every)
        return torch.cat([session.step(tokens, parents, lengths) for session in self.sessions], -1)

    def tree(self, tokens: Any, parents: Any, depths: Any) -> torch.Tensor:
        raise NotImplementedError("tree: ways are scored one by one")

    def select(self, users: torch.Tensor) -> None:
        for session in self.sessions:
            session.select(users)


def mixed(scores: Iterable[torch.Tensor], log_weights: torch.Tensor | None) -> torch.Tensor:
    """log Σ_k g_k p_k of K log-probabilities [B, …]; their own where there is one way."""
    if log_weights is None:
        return next(iter(scores))
    total: torch.Tensor | None = None
    for score, weight in zip(scores, log_weights.unbind(1), strict=True):
        joint = score + weight.view(-1, *[1] * (score.dim() - 1)).to(score.dtype)
        total = joint if total is None else torch.logaddexp(total, joint)
    assert total is not None
    return total
