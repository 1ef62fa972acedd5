"""Definition of rewards and group advantages in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import accumulation_dtype

#: Mean token log-probabilities below this are cut, so that a reward is finite: exp(30) ≈ 1e13.
MIN_MEAN_LOGPROB = -30.0


#: Rewards given directly are cut to ± this, for the same reason.
MAX_REWARD = math.exp(-MIN_MEAN_LOGPROB)


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


def group_advantage(
    token_logprobs: Tensor, mask: Tensor | None, group_size: int, kind: str, reward: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rewards = sequence_rewards(token_logprobs, mask, reward).view(-1, group_size)
    mean, std, _ = group_statistics(rewards)
    if kind == "latentr3":
        batch = batch_partial(rewards)
        advantages = batch_advantages(rewards, batch[None], eps)
    else:
        batch, advantages = mean.new_empty(0), group_advantages(rewards, kind, eps)
    return rewards, advantages, mean[:, 0].to(rewards.dtype), std[:, 0].to(rewards.dtype), batch


def group_advantage_backward(
    token_logprobs: Tensor, mask: Tensor | None, rewards: Tensor, d_rewards: Tensor, reward: str
) -> Tensor:
    d_rewards = d_rewards.reshape(-1)
    if reward == "given":
        inside = token_logprobs.reshape(-1).abs() <= MAX_REWARD
        return (d_rewards * inside).view_as(token_logprobs).to(token_logprobs.dtype)
    weight = d_rewards.new_ones(token_logprobs.shape) if mask is None else mask.to(d_rewards.dtype).contiguous()
    mean = rewards.reshape(-1) if reward == "log_likelihood" else -(-rewards.reshape(-1)).log()
    d_mean = d_rewards if reward == "log_likelihood" else d_rewards * -rewards.reshape(-1)
    d_mean = d_mean * (mean > MIN_MEAN_LOGPROB) / weight.sum(-1).clamp_min(1)
    return (d_mean[:, None] * weight).to(token_logprobs.dtype)
