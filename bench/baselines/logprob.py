"""Group advantages and token log-probabilities as they are usually written in PyTorch.

``token_logprob`` is `selective_log_softmax` of TRL (huggingface/trl 1.16, trl/trainer/utils.py) behind the product with
the lm_head. ``group_advantages`` are those of its GRPOTrainer (trl/trainer/grpo_trainer.py, `scale_rewards="group"`),
and for "latentr3" those of LatentR3 (Shengxiang-Lin/LatentR3, src/grpo_attention_tuning/grpo_trainer.py at a67bbca):
the rewards less the mean reward of members 0, by the norm over the batch. Rewards are LatentR3's, minus the perplexity
of the target. TRL also handles a group of one and rewards that are missing; neither occurs here.

Checked in tests/bench/test_baselines.py: log-probabilities against TRL's function, advantages and rewards against the
published lines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(logprobs: Tensor, mask: Tensor, size: int, kind: str, eps: float) -> tuple[Tensor, ...]:
    """Rewards, advantages, means and deviations of [B·G, S] log-probabilities, in float32; "grpo" or "latentr3"."""
    weight = mask.float()
    mean_logprob = (logprobs.float() * weight).sum(-1) / weight.sum(-1).clamp_min(1)
    rewards = -torch.exp(-mean_logprob.clamp_min(-30)).view(-1, size)
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    if kind == "grpo":
        advantages = (rewards - mean) / (std + eps)
    else:
        centred = rewards - rewards[:, 0].mean()
        advantages = centred / (centred.norm() + eps)
    return rewards, advantages, mean[:, 0], std[:, 0]


def token_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits, their log-sum-exp, the target's: [M, V] in memory, no normalised copy of it."""
    logits = (hidden @ weight.T).float()
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)
