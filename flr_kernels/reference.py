"""The definition of every op in plain PyTorch. Tests, benchmarks and the ``reference`` backend use these alone.

Shapes: ``B`` users, ``L`` tokens, ``D`` hidden size, ``K`` factors, ``G`` group size, ``S`` target tokens,
``M`` token rows, ``V`` vocabulary. Reductions run in float32, or in float64 for float64 input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import accumulation_dtype

#: Mean token log-probabilities below this are cut, so that a reward is finite: exp(30) ≈ 1e13.
MIN_MEAN_LOGPROB = -30.0
#: Rewards given directly are cut to ± this, for the same reason.
MAX_REWARD = math.exp(-MIN_MEAN_LOGPROB)


def factor_attention(h: Tensor, u: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """context [B, K, D], lse [B, K], overlap [B, K, K], entropy [B, K] of softmax(u · h) over valid tokens."""
    acc = accumulation_dtype(h.dtype)
    h, u = h.to(acc), u.to(acc)
    scores = u @ h.transpose(1, 2)  # [B, K, L]
    valid = torch.ones_like(scores[:, :1], dtype=torch.bool) if mask is None else mask[:, None]  # [B, 1, L]
    scores = scores.masked_fill(~valid, torch.finfo(acc).min)
    some = valid.any(-1)  # [B, 1]
    lse = scores.logsumexp(-1)  # [B, K]
    log_alpha = (scores - lse[..., None]).masked_fill(~valid, 0)
    alpha = log_alpha.exp() * valid  # [B, K, L]; all zero for a user without a valid token
    context = alpha @ h
    overlap = alpha @ alpha.transpose(1, 2)
    entropy = -(alpha * log_alpha).sum(-1)
    return context, lse.masked_fill(~some, -math.inf), overlap, entropy


def factor_attention_backward(
    h: Tensor,
    u: Tensor,
    mask: Tensor | None,
    context: Tensor,
    lse: Tensor,
    overlap: Tensor,
    entropy: Tensor,
    d_context: Tensor,
    d_lse: Tensor,
    d_overlap: Tensor,
    d_entropy: Tensor,
    needs_dh: bool,
) -> tuple[Tensor, Tensor]:
    """dh [B, L, D] (empty when not needed) and du [B, K, D], from saved [B, K, ·] tensors only."""
    dtype, acc = h.dtype, accumulation_dtype(h.dtype)
    h, u = h.to(acc), u.to(acc)
    empty = torch.isneginf(lse)  # users without a valid token
    log_alpha = u @ h.transpose(1, 2) - lse.masked_fill(empty, 0)[..., None]
    if mask is not None:
        log_alpha = log_alpha.masked_fill(~mask[:, None], -math.inf)
    alpha = log_alpha.exp()
    s = d_overlap + d_overlap.transpose(1, 2)  # [B, K, K]
    dp = d_context @ h.transpose(1, 2) + s @ alpha - d_entropy[..., None] * log_alpha.masked_fill(alpha == 0, 0)
    delta = (d_context * context).sum(-1) + (s * overlap).sum(-1) + d_entropy * entropy - d_lse  # [B, K]
    ds = alpha * (dp - delta[..., None])  # [B, K, L]
    du = ds @ h
    dh = alpha.transpose(1, 2) @ d_context + ds.transpose(1, 2) @ u if needs_dh else h.new_empty(0)
    return dh.to(dtype), du.to(dtype)


def factor_aggregate(f: Tensor, gate_logits: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """thought [B, D], gates [B, K], orthogonality [B], gate_entropy [B] (nats)."""
    acc = accumulation_dtype(f.dtype)
    f, log_gates = f.to(acc), gate_logits.to(acc).log_softmax(-1)
    gates = log_gates.exp()
    thought = (gates[..., None] * f).sum(1)
    unit = f * (f.square().sum(-1, keepdim=True) + eps * eps).rsqrt()
    num_factors = f.shape[1]
    cosines = (unit @ unit.transpose(1, 2)).square()  # [B, K, K]
    off_diagonal = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(-1)
    orthogonality = off_diagonal / max(num_factors * (num_factors - 1), 1)
    gate_entropy = -(gates * log_gates.clamp_min(torch.finfo(acc).min)).sum(-1)
    return thought, gates, orthogonality, gate_entropy


def sequence_rewards(token_logprobs: Tensor, mask: Tensor | None, reward: str) -> Tensor:
    """Reward of every sequence, [B·G], from token log-probabilities [B·G, S]; the mean is taken in float64."""
    acc = accumulation_dtype(token_logprobs.dtype)
    if reward == "given":
        return token_logprobs.reshape(len(token_logprobs)).to(acc).clamp(-MAX_REWARD, MAX_REWARD)
    kept = token_logprobs if mask is None else token_logprobs.masked_fill(~mask, 0)
    count = token_logprobs.shape[-1] if mask is None else mask.sum(-1)
    mean = kept.sum(-1, dtype=torch.float64) / torch.as_tensor(count).clamp_min(1)
    mean = mean.clamp_min(MIN_MEAN_LOGPROB)
    return (mean if reward == "log_likelihood" else -(-mean).exp()).to(acc)


def group_statistics(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean [B, 1], sample standard deviation [B, 1] and R - mean [B, G], in float64.

    Sums are of R - R_0, so a group of equal rewards has exactly its reward as mean and 0 as deviation.
    """
    rewards = rewards.double()
    shifted = rewards - rewards[:, :1]
    mean = shifted.mean(1, keepdim=True)
    centred = shifted - mean
    variance = centred.square().sum(1, keepdim=True) / max(rewards.shape[1] - 1, 1)
    return rewards[:, :1] + mean, variance.sqrt(), centred


def group_advantages(rewards: Tensor, kind: str, eps: float) -> Tensor:
    """Advantages [B, G] of rewards [B, G]; member 0 of a group is the unperturbed one."""
    if kind == "latentr3":
        return batch_advantages(rewards, batch_partial(rewards)[None], eps)
    size = rewards.shape[1]
    _, std, advantages = group_statistics(rewards)
    if kind == "rloo":
        advantages = advantages * (size / max(size - 1, 1))
    if kind == "grpo":
        advantages = advantages / (std + eps)
    return advantages.to(rewards.dtype)


def batch_partial(rewards: Tensor) -> Tensor:
    """What one process tells the others about its rewards [B, G] for "latentr3", float64 [4].

    The number of groups, the mean of members 0, the mean of all, and Σ (R - that mean)².
    """
    groups, size = rewards.shape
    if groups == 0:
        return rewards.new_zeros(4, dtype=torch.float64)
    mean, _, centred = group_statistics(rewards)
    clean = rewards[:, 0].double()
    baseline = clean[0] + (clean - clean[0]).mean()
    overall = mean[0, 0] + (mean - mean[0]).mean()
    squares = centred.square().sum() + size * (mean - overall).square().sum()
    return torch.stack([torch.full_like(baseline, groups), baseline, overall, squares])


def batch_advantages(rewards: Tensor, partials: Tensor, eps: float) -> Tensor:
    """(R - m) / (‖R - m‖ + ε) of rewards [B, G], with m and the norm over all processes' :func:`batch_partial` [P, 4].

    The squared norm is a sum of terms that are never negative, Σ_p squares_p + n_p (mean_p - m)², so nothing cancels.
    """
    groups, baseline, overall, squares = partials.unbind(1)
    origin = baseline[groups.argmax()]  # any process that has groups
    share = groups / groups.sum().clamp_min(1)
    m = origin + (share * (baseline - origin)).sum()
    norm = (squares + groups * rewards.shape[1] * (overall - m).square()).sum().sqrt()
    return ((rewards.double() - m) / (norm + eps)).to(rewards.dtype)


def log_normaliser(logits: Tensor) -> Tensor:
    """log Σ exp of every row of logits [R, V], [R]."""
    return logits.to(accumulation_dtype(logits.dtype)).logsumexp(-1)


def order_key(score: Tensor, tie: Tensor) -> Tensor:
    """int64 that sorts like (score, -tie): unique keys make top-k deterministic. tie in 0 .. 2**32 - 1."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (0xFFFFFFFF - tie)


def trie_step(
    logits: Tensor, score: Tensor, node: Tensor, norm: Tensor | None, children: Tensor, tokens: Tensor, leaf_begin: Tensor,
    leaf_end: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int, num_open: int, num_all: int, widest: int,
    unique: bool, filter: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Best continuations of hypotheses in a trie; shapes as in :func:`flr_kernels.trie_step`."""
    users, hypotheses = node.shape
    dead = torch.iinfo(torch.int64).min
    live = (score != -torch.inf)[..., None]
    first = children[node].long()[..., None]
    child = first + torch.arange(widest, device=node.device)
    inside = live & (child < children[node + 1].long()[..., None])
    child = torch.where(inside, child, 0)
    low, high = leaf_begin[child].long(), leaf_end[child].long()
    count = high - low
    if listed is not None and offset is not None:
        row = listed[offset[:, None] + torch.arange(entries, device=node.device)].long()

        def before(position: Tensor) -> Tensor:
            flat = position.view(users, -1)
            ranks = row.gather(1, flat) if filter == "prefix" else torch.searchsorted(row, flat)
            return ranks.view(position.shape)

        within = before(high) - before(low)
        count = count - within if filter == "exclude" else within
    inside = inside & (count > 0)
    token = torch.where(inside, tokens[child].long(), 0)
    logit = logits.gather(-1, token.flatten(1).view(users, hypotheses, -1)).float().masked_fill(~inside, -torch.inf)
    if norm is None:
        norm = logit.logsumexp(-1)
    total = logit - norm[..., None] + score[..., None].masked_fill(~live, 0.0)
    key = torch.where(inside & (total > -torch.inf), order_key(total, low), dead)
    ends = count == 1 if unique else children[child] == children[child + 1]

    def best(keys: Tensor, width: int) -> tuple[Tensor, ...]:
        padded = torch.nn.functional.pad(keys.flatten(1), (0, width), value=dead)  # fewer children than `width`
        top, index = padded.topk(width, dim=1)
        alive, index = top != dead, index.clamp_max(max(keys[0].numel() - 1, 0))
        values = (total.flatten(1).gather(1, index), child.flatten(1).gather(1, index), index // widest)
        fill = (-torch.inf, 0, 0)
        return *(torch.where(alive, v, f) for v, f in zip(values, fill, strict=True)), top

    invalid = (live[..., 0] & ~norm.isfinite()).any(1)
    return *best(key.masked_fill(ends, dead), num_open), *best(key, num_all), invalid


def token_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log softmax(hidden · weightᵀ)[target], [M]."""
    acc = accumulation_dtype(hidden.dtype)
    logits = (hidden @ weight.T).to(acc)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
