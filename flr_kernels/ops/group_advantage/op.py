"""Rewards and group-relative advantages of G sampled sequences a user, in one op.

    mean_i = Σ_s m_is logp_is / max(Σ_s m_is, 1)          cut below at -30
    R_i    = -exp(-mean_i) ("neg_perplexity")  or  mean_i ("log_likelihood")  or  as passed, cut at ±exp(30) ("given")

    "grpo"      (R - mean) / (std + ε)     mean and sample standard deviation of the group
    "dr_grpo"   R - mean
    "rloo"      R_i - mean of the others
    "latentr3"  (R - m) / (‖R - m‖₂ + ε)   m = mean of member 0's rewards, norm over all B·G rewards

All sums run in float64, over the rewards as returned. "latentr3" looks at the whole batch: with a process group, every
process sends four numbers (:func:`flr_kernels.reference.batch_partial`) in one all-reduce.

Sources: GRPO arXiv 2402.03300, Dr. GRPO arXiv 2503.20783, RLOO arXiv 2402.14740, LatentR3 arXiv 2505.19092.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch
from ...backends import extension
from . import reference

KINDS = ("grpo", "dr_grpo", "rloo", "latentr3")
REWARDS = ("neg_perplexity", "log_likelihood", "given")


class GroupAdvantage(NamedTuple):
    """Result of :func:`group_advantage`, in the accumulation dtype (float32, or float64 for float64 input)."""

    rewards: Tensor  # [B, G]
    advantages: Tensor  # [B, G]
    mean: Tensor  # [B], of the group's rewards
    std: Tensor  # [B], their sample standard deviation; 0 for G = 1


_OP, _BATCH_OP = dispatch.op("group_advantage"), dispatch.op("batch_advantage")
_OP.register("reference", reference.group_advantage, reference.group_advantage_backward)
_BATCH_OP.register("reference", reference.batch_advantages)
for _backend, _check in (("cuda", extension.check_cuda), ("host", extension.check_host)):
    _on_cpu = _backend == "host"
    _OP.register(_backend, extension.group_advantage, reference.group_advantage_backward, _check, on_cpu=_on_cpu)
    _BATCH_OP.register(_backend, extension.batch_advantage, check=_check, on_cpu=_on_cpu)


@dispatch.forward_op("group_advantage")
def _forward(
    token_logprobs: Tensor, mask: Tensor | None, group_size: int, kind: str, reward: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = token_logprobs.shape[0] // group_size
    shapes = (groups, group_size), (groups, group_size), (groups,), (groups,)
    batch = token_logprobs.new_empty(4 if kind == "latentr3" else 0, dtype=torch.float64)
    return *checks.empty_results(token_logprobs, *shapes), batch


@dispatch.backward_op("group_advantage")
def _backward(token_logprobs: Tensor, mask: Tensor | None, rewards: Tensor, d_rewards: Tensor, reward: str) -> Tensor:
    return token_logprobs.new_empty(token_logprobs.shape)


@dispatch.forward_op("batch_advantage")
def _batch_advantage(rewards: Tensor, partials: Tensor, eps: float) -> Tensor:
    return rewards.new_empty(rewards.shape)


def _setup_context(ctx, inputs, output):
    token_logprobs, mask, _, _, ctx.reward, _ = inputs
    ctx.save_for_backward(token_logprobs, mask, output[0])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, d_rewards, *_):
    token_logprobs, mask, rewards = ctx.saved_tensors
    return _backward(token_logprobs, mask, rewards, d_rewards, ctx.reward), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _gather(batch: Tensor, process_group: Any) -> Tensor:
    """Every process's ``batch`` [4], as [P, 4], in the order of ranks."""
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"process_group: expected a torch.distributed group this process belongs to, got {process_group!r}"
        )
    gathered = batch.new_zeros(process_group.size(), 4)
    gathered[process_group.rank()] = batch
    torch.distributed.all_reduce(gathered, group=process_group)  # a value and zeros: exact in any order
    return gathered


def group_advantage(
    token_logprobs: Tensor,
    mask: Tensor | None,
    group_size: int,
    kind: str = "grpo",
    reward: str = "neg_perplexity",
    eps: float = 1e-4,
    process_group: Any = None,
) -> GroupAdvantage:
    """Rewards and advantages of ``B`` groups of ``group_size`` sequences.

    Args:
        token_logprobs: [B·G, S], a group's members adjacent, member 0 the unperturbed one; or the rewards themselves,
            [B·G], with ``reward="given"``.
        mask: bool [B·G, S], true for target tokens; None for all. Must be None for given rewards.
        group_size: G >= 1; must divide the number of rows.
        kind: "grpo", "dr_grpo", "rloo" or "latentr3".
        reward: "neg_perplexity", "log_likelihood" or "given".
        eps: added to the divisor of "grpo" and "latentr3"; finite, >= 0. With 0, equal rewards give NaN there.
        process_group: a ``torch.distributed`` group whose processes hold the batch between them, in any split (some may
            hold nothing, but all must call); None for this process alone. Only "latentr3" needs it.

    Returns:
        :class:`GroupAdvantage`. Rewards pass gradients to ``token_logprobs``; the rest are constants. With eps > 0 they
        are finite for equal rewards (advantages 0), for G = 1 (0, except "latentr3") and for log-probabilities of -inf,
        because the mean is cut at -30 and given rewards at ±exp(30). A row without target tokens has mean
        log-probability 0.
        NaN in a target token makes its sequence's reward NaN, and with it the advantages and statistics of its group
        ("latentr3": all advantages); elsewhere it is without effect. +inf is no log-probability and may give NaN too.

        Advantages are computed from R in float64, from differences to one of its values: for n rewards in any split
        over processes their relative error is below 2⁻⁵⁰ (max|R| / spread + n), and one rounding to the result's dtype.

    Raises:
        ValueError: a shape, dtype, device, number or name does not fit.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> logp = torch.log(torch.tensor([[0.5], [0.25], [0.1], [0.1]]))
        >>> out = group_advantage(logp, None, group_size=2, kind="dr_grpo")
        >>> out.rewards.tolist(), out.advantages.tolist(), out.mean.tolist()
        ([[-2.0, -4.0], [-10.0, -10.0]], [[1.0, -1.0], [0.0, 0.0]], [-3.0, -10.0])
    """
    checks.choice("kind", kind, KINDS)
    checks.choice("reward", reward, REWARDS)
    checks.tensor("token_logprobs", token_logprobs, "BG" if reward == "given" else "BG S")
    rows = token_logprobs.shape[0]
    if rows % checks.integer("group_size", group_size, 1, (1 << 31) - 1):
        raise ValueError(f"group_size: expected a positive divisor of the {rows} rows, got {group_size}")
    eps = checks.number("eps", eps, 0)
    if mask is not None:
        if reward == "given":
            raise ValueError("mask: expected None for given rewards, got a tensor")
        checks.tensor("mask", mask, "BG S", dtypes=(torch.bool,), beside=("token_logprobs", token_logprobs))
        checks.same("mask", tuple(mask.shape), tuple(token_logprobs.shape), "shape of token_logprobs")
    rewards, advantages, mean, std, batch = _forward(token_logprobs, mask, group_size, kind, reward, eps)
    if process_group is not None and kind == "latentr3":
        advantages = _batch_advantage(rewards.detach(), _gather(batch, process_group), eps)
    return GroupAdvantage(rewards, advantages, mean, std)
