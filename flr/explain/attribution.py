"""What each factor contributes to the log-probability of an item: Shapley values of the thought's K parts.

The embedding at a thought position is anchor + Σ_k c_k with c_k = g_k f_k, an exact sum. For a set S of factors let

    v(S) = log p(item | prompt, anchor + Σ_{k in S} c_k)

the item's log-probability when the other factors' parts are left out of the thought (all parts as the complete model
made them; of every thought where there are several). Contribution of factor k is its Shapley value

    φ_k = mean over all orders of the factors of v(those before k, and k) - v(those before k)

so that Σ_k φ_k = v(all) - v(none): the contributions add up exactly to what the factors together did to the item's
score, none is counted twice where factors overlap, and a factor that changes nothing gets 0. (The gradient times c_k is
exact only for a short thought; leaving out one factor at a time gives each of two redundant factors nothing.) What a
factor did to *later* refinements' queries and gates is theirs, not its own.

For K <= 6 all 2^K sets are computed. For more factors the orders are the K rotations of 1..K and their reverses,
K (K - 1) + 2 sets: the sum stays exact, and so does every φ_k whose factors interact at most in pairs (each pair stands
in either order equally often).

Under ``aggregation="mixture"`` every factor has a thought anchor + f_k of its own. Leaving a factor out takes f_k from
its thought, not its weight, so that with p_k(item) after its own thought and p_0(item) after the anchor alone

    v(S) = log Σ_k g_k (p_k if k in S else p_0)

needs K + 1 thoughts for all sets, and all of the above holds. What a factor is answerable for is known without leaving
anything out: its posterior responsibility g_k p_k(item) / Σ_j g_j p_j(item), the shares of :func:`attribute`.

Source: L. S. Shapley, "A value for n-person games", 1953.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from flr.decode import CatalogueTrie, ItemFilter, Scoring, item_filter
from flr.decode.packed import obstacle
from flr.decode.prompts import prepare_inputs
from flr.decode.ways import thoughts_apart
from flr.model.backbone import cache_argument, cache_of, causal_lm, is_patched, takes_positions
from flr.model.encoder import thoughts_made
from flr.model.factor_mixture import FactorStates
from flr.model.head import head
from flr.model.outputs import FLROutput

#: Up to this K every set of factors is computed.
EXACT_FACTORS = 6
#: Summed magnitude of log-probabilities below which contributions are rounding errors.
NOISE = 1e-6
_MAX_LOGITS = 1 << 25  # of one forward over suffixes, 128 MiB in float32
_MAX_ROWS = 512


@functools.cache
def coalitions(num_factors: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets of factors to score, bool [A, K], empty first and complete last; weights float64 [K, A]: φ = weights @ v.

    >>> sets, weights = coalitions(2)
    >>> sets.astype(int).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    >>> weights.tolist()
    [[-0.5, 0.5, -0.5, 0.5], [-0.5, -0.5, 0.5, 0.5]]
    >>> len(coalitions(16)[0])
    242
    """
    if num_factors < 1:
        raise ValueError(f"num_factors: expected at least 1, got {num_factors}")
    factors = range(num_factors)
    if num_factors <= EXACT_FACTORS:
        sets = (np.arange(2**num_factors)[:, None] >> np.arange(num_factors)) & 1 == 1
        share = [1 / (num_factors * math.comb(num_factors - 1, size)) for size in factors]
        size = sets.sum(1)
        joins = np.array([0.0, *share])[size]  # of a set that the factor is in: it joined the size - 1 others
        leaves = np.array([*share, 0.0])[size]
        return sets, np.where(sets, joins[:, None], -leaves[:, None]).T
    steps: list[tuple[int, frozenset[int], frozenset[int]]] = []  # a factor, those before it, and these with it
    for first in factors:
        turned = [(first + step) % num_factors for step in factors]
        for order in (turned, turned[::-1]):
            steps += [(factor, frozenset(order[:i]), frozenset(order[: i + 1])) for i, factor in enumerate(order)]
    groups = sorted({group for step in steps for group in step[1:]}, key=lambda group: (len(group), sorted(group)))
    rank = {group: position for position, group in enumerate(groups)}
    sets = np.array([[factor in group for factor in factors] for group in groups])
    weights = np.zeros((num_factors, len(groups)))
    for factor, before, after in steps:
        weights[factor, rank[after]] += 1
        weights[factor, rank[before]] -= 1
    return sets, weights / (2 * num_factors)


def influence_shares(contributions: np.ndarray) -> np.ndarray:
    """|φ_k| / Σ_j |φ_j| of contributions [..., K]: shares that sum to 1; 1 / K each where no factor moves the score.

    >>> influence_shares(np.array([0.6, -0.2, 0.0])).round(2).tolist()
    [0.75, 0.25, 0.0]
    """
    size = np.abs(contributions)
    total = size.sum(-1, keepdims=True)
    alike = np.full_like(size, 1 / size.shape[-1])
    return np.where(total > NOISE, size / np.where(total > NOISE, total, 1), alike)


@dataclass
class ThinkingPrompts:
    """Prompts of B users, encoded once, and the parts of their thoughts; L columns without those of N thoughts."""

    lm: Any
    embeds: Tensor  # [B, L, D]
    mask: Tensor  # int64 [B, L]
    positions: Tensor | None  # int64 [B, L + N]
    anchors: Tensor  # [B, N, D], the thought's embedding without factors
    contributions: Tensor  # [B, N, K, D], the parts g_k f_k of a thought, or f_k of its own thought in a mixture
    output: FLROutput
    log_gates: Tensor | None  # [B, K] of a mixture; None for one thought
    layers: list[Any] | None  # cache layers cut to L columns; None where this cache cannot be cut


@torch.no_grad()
def think(model: nn.Module, inputs: Mapping[str, Any], reserve: int) -> ThinkingPrompts | None:
    """Encode prompts with a patched model; None where its variant has no factors.

    Args:
        model: in eval mode. inputs: a processor's output for B prompts.
        reserve: how many tokens will follow the thoughts at most.
    """
    lm = causal_lm(model)
    if not is_patched(lm) or not lm._flr_patch.config.has_reasoner:
        return None
    if (apart := thoughts_apart(model, inputs)) is not None:
        return _thinking_apart(lm, *apart, reserve)
    config = lm._flr_patch.config
    prepared = prepare_inputs(model, inputs)
    if not takes_positions(lm):
        del prepared["position_ids"]
    out = lm(**prepared, use_cache=True, logits_to_keep=1)
    ids, count = prepared["input_ids"], config.num_thoughts
    if not bool((ids[:, -count:] == config.thought_token_id).all()):
        raise ValueError(f"inputs: expected prompts that end with {count} thought tokens")
    length = ids.shape[1] - count
    embeds = lm.get_input_embeddings()(ids)
    anchors = embeds[:, length:]
    if config.anchor == "none":
        anchors = torch.zeros_like(anchors)
    elif config.anchor == "last":
        anchors = embeds[:, length - 1 : length].expand_as(anchors)
    return ThinkingPrompts(
        lm=lm,
        embeds=embeds[:, :length],
        mask=prepared["attention_mask"][:, :length],
        positions=prepared.get("position_ids"),
        anchors=anchors,
        contributions=torch.stack([step.contributions for step in out.flr.steps], 1),
        output=out.flr,
        log_gates=None,
        layers=_cut(cache_of(out), length, length + count + reserve),
    )


def _thinking_apart(lm: Any, states: FactorStates, prepared: Mapping[str, Any], reserve: int) -> ThinkingPrompts:
    config, (batch, length) = lm._flr_patch.config, states.history.shape[:2]
    cache, longest = states.members.cache, length + 1 + reserve
    goes_on = states.members.packed and cache is not None and obstacle(lm, cache, longest) is None
    everyone = torch.ones(batch, dtype=torch.bool, device=states.history.device)
    return ThinkingPrompts(
        lm=lm,
        embeds=states.prompt.embeds,
        mask=states.prompt.mask,
        positions=prepared["position_ids"] if takes_positions(lm) else None,
        anchors=states.anchor[:, None],
        contributions=states.made.factors[:, None],
        output=thoughts_made(config, [states.made], [everyone], None),
        log_gates=states.log_gates,
        layers=_cut(cache, length, longest) if goes_on else None,
    )


def _cut(cache: Any, length: int, longest: int) -> list[Any] | None:
    """The cache's layers with their first ``length`` columns; None unless they hold every column and keep doing so."""
    layers = []
    for layer in getattr(cache, "layers", [None]):
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or (window is not None and longest >= window):
            return None
        if not layer.is_initialized:
            return None
        cut = copy.copy(layer)
        cut.keys, cut.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        if hasattr(cut, "cumulative_length"):
            cut.cumulative_length = length
        layers.append(cut)
    return layers


def _suffix_logits(prompts: ThinkingPrompts, user: Tensor, thoughts: Tensor, tokens: Tensor) -> Tensor:
    """Logits [R, S, V] after thoughts [R, N, D] and after each of tokens [R, S - 1] behind the prompts of users [R]."""
    lm, after = prompts.lm, tokens.shape[1]
    suffix = torch.cat([thoughts, lm.get_input_embeddings()(tokens)], 1)
    mask = torch.cat([prompts.mask[user], prompts.mask.new_ones(suffix.shape[:2])], 1)
    inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": prompts.layers is not None}
    if prompts.layers is None:
        inputs["inputs_embeds"] = torch.cat([prompts.embeds[user], suffix], 1)
    else:
        layers = [copy.copy(layer) for layer in prompts.layers]
        for layer in layers:
            layer.keys, layer.values = layer.keys[user], layer.values[user]
        inputs |= {"inputs_embeds": suffix, **cache_argument(lm.base_model, Cache(layers=layers))}
    if prompts.positions is not None:
        known = prompts.positions[user]
        positions = torch.cat([known, known[:, -1:] + 1 + torch.arange(after, device=user.device)], 1)
        inputs["position_ids"] = positions[:, -inputs["inputs_embeds"].shape[1] :]
    hidden = lm.base_model(**inputs).last_hidden_state
    return head(lm, hidden[:, -(1 + after) :])


@dataclass
class _Siblings:
    """Items of one user's list whose tokens differ in the last one only: the model runs once for all of them."""

    user: int
    prefix: tuple[int, ...]
    columns: list[int]  # places in the user's list
    last: list[int]  # last tokens


class Attribution(NamedTuple):
    """What the factors did to the scores of items [B, k]; 0 where there is no item.

    Attributes:
        base: float64 [B, k], the item's log-probability without any factor's part.
        contributions: float64 [B, k, K]; base + contributions.sum(-1) is the item's score.
        shares: float64 [B, k, K], >= 0 and 1 in sum: of the contributions' magnitudes, or in a mixture the factors'
            posterior responsibilities (with ``mixed_with``, for the prompt's part of the score).
    """

    base: np.ndarray
    contributions: np.ndarray
    shares: np.ndarray


@torch.no_grad()
def attribute(
    prompts: ThinkingPrompts,
    codec: Any,
    items: np.ndarray,
    trie: CatalogueTrie,
    scoring: Scoring = "full",
    exclude: Tensor | None = None,
    allowed: Tensor | None = None,
    mixed_with: tuple[np.ndarray, np.ndarray] | None = None,
) -> Attribution:
    """Contributions of the factors to the log-probabilities of items.

    Args:
        prompts: from :func:`think`.
        codec: the item codec (``encode(i)``).
        items: int64 [B, k] item indices, -1 for none.
        trie: of the codec, on the model's device.
        scoring, exclude, allowed: as the items were ranked with (see :mod:`flr.decode`): the values are those scores.
        mixed_with: (log weight, log rest), float64 [B, k] each, for items ranked by weight * p(item | prompt) + rest: v
            is the logarithm of that, the rest is taken as it is.
    """
    num_factors = prompts.contributions.shape[2]
    sets, weights = coalitions(num_factors)
    base = np.zeros(items.shape)
    contributions = np.zeros((*items.shape, num_factors))
    vocabulary = prompts.lm.config.get_text_config(decoder=True).vocab_size
    thoughts, log_gates = sets, None
    shares: dict[tuple[int, int], np.ndarray] = {}
    if prompts.log_gates is not None:  # the anchor, and each factor's own thought
        thoughts = np.concatenate([np.zeros((1, num_factors), bool), np.eye(num_factors, dtype=bool)])
        log_gates = prompts.log_gates.double().cpu().numpy()
    for group in _batches(_siblings(codec, items), len(thoughts), vocabulary):
        found = _values(prompts, group, thoughts, trie, scoring, exclude, allowed)
        for siblings, values in zip(group, found, strict=True):
            if log_gates is not None:
                values, own = _of_mixture(values, sets, log_gates[siblings.user])
                shares |= {(siblings.user, column): x for column, x in zip(siblings.columns, own.T, strict=True)}
            if mixed_with is not None:
                log_weight, log_rest = (x[siblings.user, siblings.columns] for x in mixed_with)
                values = np.logaddexp(values + log_weight, log_rest)
            base[siblings.user, siblings.columns] = values[0]
            contributions[siblings.user, siblings.columns] = (weights @ values).T
    influence = influence_shares(contributions)
    for place, own in shares.items():
        influence[place] = own
    return Attribution(base, contributions, influence)


def _of_mixture(values: np.ndarray, sets: np.ndarray, log_gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v [A, n] of every set of factors bool [A, K], and responsibilities [K, n], from log-probabilities [K + 1, n]."""
    joint = np.where(sets[..., None], values[1:], values[0]) + log_gates[:, None]  # [A, K, n]
    mixed = np.logaddexp.reduce(joint, axis=1)
    return mixed, np.exp(joint[-1] - mixed[-1])


def _siblings(codec: Any, items: np.ndarray) -> list[_Siblings]:
    entries: dict[tuple[int, tuple[int, ...]], _Siblings] = {}
    for user, column in np.argwhere(items >= 0).tolist():
        *prefix, last = (int(token) for token in codec.encode(int(items[user, column])))
        entry = entries.setdefault((user, tuple(prefix)), _Siblings(user, tuple(prefix), [], []))
        entry.columns.append(column)
        entry.last.append(last)
    return sorted(entries.values(), key=lambda entry: len(entry.prefix))


def _batches(entries: list[_Siblings], num_sets: int, vocabulary: int) -> Iterator[list[_Siblings]]:
    """Runs of entries (by ascending length) whose forward stays within bounds; at least one entry each."""
    batch: list[_Siblings] = []
    for entry in entries:
        rows = (len(batch) + 1) * num_sets
        if batch and (rows > _MAX_ROWS or rows * (len(entry.prefix) + 1) * vocabulary > _MAX_LOGITS):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _values(
    prompts: ThinkingPrompts,
    group: list[_Siblings],
    sets: np.ndarray,
    trie: CatalogueTrie,
    scoring: Scoring,
    exclude: Tensor | None,
    allowed: Tensor | None,
) -> Iterator[np.ndarray]:
    """v of every set of factors, float64 [A, items of the entry], for every entry."""
    device = prompts.embeds.device
    tokens = pad_sequence([torch.tensor(entry.prefix, dtype=torch.int64) for entry in group], batch_first=True)
    users = torch.tensor([entry.user for entry in group], device=device)
    parts = prompts.contributions[users]  # [E, N, K, D]
    chosen = torch.from_numpy(sets).to(device, parts.dtype)
    anchors = prompts.anchors[users]
    thoughts = torch.einsum("ak,enkd->eand", chosen, parts).to(anchors.dtype) + anchors[:, None]
    number = len(sets)
    rows, behind = users.repeat_interleave(number), tokens.to(device).repeat_interleave(number, 0)
    logits = _suffix_logits(prompts, rows, thoughts.flatten(0, 1), behind).float()
    logits = logits.view(len(group), number, tokens.shape[1] + 1, -1)  # [E, A, S, V]
    if scoring == "full":
        norm = logits.logsumexp(-1)
    else:
        if exclude is not None:
            exclude = exclude.to(device)[users]
        if allowed is not None and allowed.ndim == 2:
            allowed = allowed.to(device)[users]
        norm = _catalogue_norm(logits, group, item_filter(trie, len(group), allowed, exclude), trie)
    scores = logits - norm[..., None]
    for row, entry in enumerate(group):
        size, own = len(entry.prefix), scores[row].double()  # [A, S, V]
        path = own[:, range(size), entry.prefix].sum(-1, keepdim=True) if size else 0.0  # [A, 1]
        yield (path + own[:, size, entry.last]).cpu().numpy()


def _catalogue_norm(logits: Tensor, group: list[_Siblings], allows: ItemFilter, trie: CatalogueTrie) -> Tensor:
    """logsumexp [E, A, S] over the tokens that lead from an entry's prefix to allowed items."""
    nodes = torch.zeros(logits.shape[0], logits.shape[2], dtype=torch.int64)  # [E, S]; the root past an entry's end
    for row, entry in enumerate(group):
        for step in range(len(entry.prefix)):
            nodes[row, step + 1] = trie.walk(entry.prefix[: step + 1])
    nodes = nodes.to(logits.device)
    begin = trie.children[nodes].long()
    fanout = trie.children[nodes + 1].long() - begin
    column = torch.arange(int(fanout.max()), device=logits.device)
    inside = column < fanout[..., None]
    child = torch.where(inside, begin[..., None] + column, 0)  # [E, S, F]
    allowed = inside & (allows.count(trie.leaf_begin[child].long(), trie.leaf_end[child].long()) > 0)
    token = trie.tokens[child].long().clamp_min(0)
    raw = logits.gather(-1, token[:, None].expand(-1, logits.shape[1], -1, -1))
    return raw.masked_fill(~allowed[:, None], -torch.inf).logsumexp(-1)
