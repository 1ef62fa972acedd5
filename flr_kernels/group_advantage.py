"""Rewards and group-relative advantages of G sampled sequences a user, in one op.

    mean_i = Σ_s m_is logp_is / max(Σ_s m_is, 1)          cut below at -30
    R_i    = -exp(-mean_i)  ("neg_perplexity")   or   mean_i  ("log_likelihood")   or   as passed  ("given")

    "grpo"      (R - mean) / (std + ε)     mean and sample standard deviation of the group
    "dr_grpo"   R - mean
    "rloo"      R_i - mean of the others
    "latentr3"  (R - m) / (‖R - m‖₂ + ε)   m = mean of member 0's rewards, norm over all B·G rewards

Sources: GRPO arXiv 2402.03300, Dr. GRPO arXiv 2503.20783, RLOO arXiv 2402.14740, LatentR3 arXiv 2505.19092.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, reference

KINDS = ("grpo", "dr_grpo", "rloo", "latentr3")
REWARDS = ("neg_perplexity", "log_likelihood", "given")


class GroupAdvantage(NamedTuple):
    """Result of :func:`group_advantage`, in the accumulation dtype."""

    rewards: Tensor  # [B, G]
    advantages: Tensor  # [B, G]


def _reference(
    token_logprobs: Tensor, mask: Tensor | None, group_size: int, kind: str, reward: str, eps: float
) -> tuple[Tensor, Tensor]:
    rewards = reference.sequence_rewards(token_logprobs, mask, reward).view(-1, group_size)
    return rewards, reference.group_advantages(rewards, kind, eps)


def _reference_backward(
    token_logprobs: Tensor, mask: Tensor | None, rewards: Tensor, d_rewards: Tensor, reward: str
) -> Tensor:
    d_rewards = d_rewards.reshape(-1)
    if reward == "given":
        inside = token_logprobs.reshape(-1).abs() <= reference.MAX_REWARD
        return (d_rewards * inside).view_as(token_logprobs).to(token_logprobs.dtype)
    weight = torch.ones_like(token_logprobs, dtype=d_rewards.dtype) if mask is None else mask.to(d_rewards.dtype)
    mean = rewards.reshape(-1) if reward == "log_likelihood" else -(-rewards.reshape(-1)).log()
    d_mean = d_rewards if reward == "log_likelihood" else d_rewards * -rewards.reshape(-1)
    d_mean = d_mean * (mean > reference.MIN_MEAN_LOGPROB) / weight.sum(-1).clamp_min(1)
    return (d_mean[:, None] * weight).to(token_logprobs.dtype)


dispatch.op("group_advantage").register("reference", _reference, _reference_backward)


@torch.library.custom_op("flr::group_advantage", mutates_args=())
def _forward(
    token_logprobs: Tensor, mask: Tensor | None, group_size: int, kind: str, reward: str, eps: float
) -> tuple[Tensor, Tensor]:
    return dispatch.forward("group_advantage", token_logprobs, mask, group_size, kind, reward, eps)


@_forward.register_fake
def _(token_logprobs, mask, group_size, kind, reward, eps):
    shape = (token_logprobs.shape[0] // group_size, group_size)
    acc = checks.accumulation_dtype(token_logprobs.dtype)
    return token_logprobs.new_empty(shape, dtype=acc), token_logprobs.new_empty(shape, dtype=acc)


@torch.library.custom_op("flr::group_advantage_backward", mutates_args=())
def _backward(token_logprobs: Tensor, mask: Tensor | None, rewards: Tensor, d_rewards: Tensor, reward: str) -> Tensor:
    return dispatch.backward("group_advantage", token_logprobs, mask, rewards, d_rewards, reward)


@_backward.register_fake
def _(token_logprobs, mask, rewards, d_rewards, reward):
    return torch.empty_like(token_logprobs)


def _setup_context(ctx, inputs, output):
    token_logprobs, mask, _, _, ctx.reward, _ = inputs
    ctx.save_for_backward(token_logprobs, mask, output[0])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, d_rewards, _):
    token_logprobs, mask, rewards = ctx.saved_tensors
    grad = None if d_rewards is None else _backward(token_logprobs, mask, rewards, d_rewards, ctx.reward)
    return grad, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def group_advantage(
    token_logprobs: Tensor,
    mask: Tensor | None,
    group_size: int,
    kind: str = "grpo",
    reward: str = "neg_perplexity",
    eps: float = 1e-4,
) -> GroupAdvantage:
    """Rewards and advantages of ``B`` groups of ``group_size`` sequences.

    Args:
        token_logprobs: [B·G, S], a group's members adjacent, member 0 the unperturbed one; or the rewards themselves,
            [B·G], with ``reward="given"``.
        mask: bool [B·G, S], true for target tokens; None for all. Must be None for given rewards.
        group_size: G >= 1; must divide the number of rows.
        kind: "grpo", "dr_grpo", "rloo" or "latentr3".
        reward: "neg_perplexity", "log_likelihood" or "given".
        eps: added to the divisor of "grpo" and "latentr3".

    Returns:
        :class:`GroupAdvantage`. Rewards pass gradients to ``token_logprobs``; advantages are constants. Finite for
        equal rewards (advantages 0), for G = 1 (0, except "latentr3") and for log-probabilities of -inf, because the
        mean is cut at -30 and given rewards at ±exp(30). A row without target tokens has mean log-probability 0.

    Raises:
        ValueError: a shape, dtype or name does not fit.

    Example:
        >>> import torch
        >>> logp = torch.log(torch.tensor([[0.5], [0.25], [0.1], [0.1]]))
        >>> out = group_advantage(logp, None, group_size=2, kind="dr_grpo")
        >>> out.rewards.tolist(), out.advantages.tolist()
        ([[-2.0, -4.0], [-10.0, -10.0]], [[1.0, -1.0], [0.0, 0.0]])
    """
    checks.choice("kind", kind, KINDS)
    checks.choice("reward", reward, REWARDS)
    checks.tensor("token_logprobs", token_logprobs, "BG" if reward == "given" else "BG S")
    rows = token_logprobs.shape[0]
    if not isinstance(group_size, int) or group_size < 1 or rows % group_size:
        raise ValueError(f"group_size: expected a positive divisor of the {rows} rows, got {group_size!r}")
    if mask is not None:
        if reward == "given":
            raise ValueError("mask: expected None for given rewards, got a tensor")
        checks.tensor("mask", mask, "BG S", dtypes=(torch.bool,))
        checks.same("mask", tuple(mask.shape), tuple(token_logprobs.shape), "shape of token_logprobs")
        checks.same("mask", mask.device, token_logprobs.device, "device of token_logprobs")
    return GroupAdvantage(*_forward(token_logprobs, mask, group_size, kind, reward, float(eps)))
