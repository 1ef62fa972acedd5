"""The clipped surrogate of a group-relative policy, and the rewards that its advantages come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from flr_kernels import group_advantage
from flr_kernels.ops.group_advantage.op import GroupAdvantage

LIKELIHOODS = ("neg_perplexity", "log_likelihood")


class RewardInputs(NamedTuple):
    """What a reward may look at; no gradients."""

    logprobs: Tensor  # [B, G, S], 0 behind a row's target
    target_mask: Tensor  # bool [B, S]
    targets: Tensor  # int64 [B, S], tokens
    thoughts: Tensor  # [B, G, N, D], as fed
    prompts: Mapping[str, Tensor]  # input_ids [B, L + N] and the like
    items: Tensor  # int64 [B], the target's index in the catalogue
    ranks: Callable[[], Tensor]  # int64 [B, G]: place of the target in the member's ranked list, 1 is best, 0 not in it


RewardFunction = Callable[[RewardInputs], Tensor]


@dataclass(frozen=True)
class Rewards:
    """A weighted sum of rewards.

    Attributes:
        terms: weight by reward: "neg_perplexity", "log_likelihood", "hit@k", "ndcg@k", "mrr", or a function of
            :class:`RewardInputs` that returns [B, G].

    Example:
        >>> Rewards.parse("log_likelihood=1,ndcg@10=0.5").terms
        {'log_likelihood': 1.0, 'ndcg@10': 0.5}
        >>> Rewards.parse("accuracy")
        Traceback (most recent call last):
        ...
        ValueError: reward: expected neg_perplexity, log_likelihood, mrr, hit@k or ndcg@k (=weight), got 'accuracy'
    """

    terms: Mapping[str | RewardFunction, float] = field(default_factory=lambda: {"neg_perplexity": 1.0})

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("reward: expected at least one, got none")
        for name, weight in self.terms.items():
            if isinstance(name, str):
                _check_name(name)
            if not math.isfinite(weight):
                raise ValueError(f"reward: expected a finite number as weight of {name}, got {weight}")

    @classmethod
    def parse(cls, text: str, option: str = "reward") -> Rewards:
        """From names with weights, ``"log_likelihood=1,ndcg@10=0.5"``; ``option`` is what errors call the text."""
        terms: dict[str | RewardFunction, float] = {}
        for part in text.split(","):
            name, _, weight = part.strip().partition("=")
            _check_name(name, option)
            if name in terms:
                raise ValueError(f"{option}: expected every reward once, got {name} again in {text!r}")
            try:
                terms[name] = float(weight or 1)
            except ValueError:
                terms[name] = math.nan
            if not math.isfinite(terms[name]):
                raise ValueError(f"{option}: expected a finite number as weight of {name}, got {weight!r}")
        return cls(terms)

    @property
    def names(self) -> dict[str, float]:
        """Weight by name; that of a function is where it is defined."""
        return {
            term
            if isinstance(term, str)
            else f"{term.__module__}.{getattr(term, '__qualname__', type(term).__name__)}": w
            for term, w in self.terms.items()
        }

    @property
    def may_decode(self) -> bool:
        """Whether a term may ask for the ranks that constrained decoding gives."""
        return any(name not in LIKELIHOODS for name in self.terms)

    @property
    def longest_list(self) -> int:
        """The largest k that a term looks at; 1 without one."""
        cutoffs = [name.partition("@")[2] for name in self.terms if isinstance(name, str)]
        return max((int(cutoff) for cutoff in cutoffs if cutoff), default=1)

    def of(self, inputs: RewardInputs) -> Tensor:
        """Rewards [B, G]."""
        batch, members, _ = inputs.logprobs.shape
        total = inputs.logprobs.new_zeros(batch, members)
        for name, weight in self.terms.items():
            if not isinstance(name, str):
                value = name(inputs)
                if value.shape != (batch, members):
                    raise ValueError(
                        f"reward: expected [{batch}, {members}] of a function, got shape {tuple(value.shape)}"
                    )
            elif name in LIKELIHOODS:
                mask = inputs.target_mask.repeat_interleave(members, 0)
                value = group_advantage(inputs.logprobs.flatten(0, 1), mask, members, "dr_grpo", name).rewards
            else:
                value = ranking_reward(inputs.ranks(), name)
            total = total + weight * value.to(total.dtype)
        return total

    def advantages(
        self,
        inputs: RewardInputs,
        kind: str = "grpo",
        eps: float = 1e-4,
        from_clean: bool = False,
        process_group: Any = None,
    ) -> GroupAdvantage:
        """Rewards and advantages [B, G], see :func:`flr_kernels.group_advantage`.

        Args:
            from_clean: "latentr3" compares a reward with that of the unperturbed member of its own group instead of the
                mean of these over the batch. The other kinds look at differences within a group anyway.
        """
        members = inputs.logprobs.shape[1]
        alone = next(iter(self.terms))
        shifted = from_clean and kind == "latentr3"
        if len(self.terms) == 1 and self.terms[alone] == 1 and alone in LIKELIHOODS and not shifted:
            mask = inputs.target_mask.repeat_interleave(members, 0)
            return group_advantage(inputs.logprobs.flatten(0, 1), mask, members, kind, str(alone), eps, process_group)
        total = self.of(inputs)
        given = total - total[:, :1] if shifted else total
        result = group_advantage(given.flatten(), None, members, kind, "given", eps, process_group)
        return result._replace(rewards=total, mean=total.mean(1))


def _check_name(name: str, option: str = "reward") -> None:
    metric, _, cutoff = name.partition("@")
    ranking = (metric in ("hit", "ndcg") and cutoff.isdecimal() and int(cutoff) > 0) or name == "mrr"
    if name not in LIKELIHOODS and not ranking:
        raise ValueError(f"{option}: expected {', '.join(LIKELIHOODS)}, mrr, hit@k or ndcg@k (=weight), got {name!r}")


def ranking_reward(ranks: Tensor, name: str) -> Tensor:
    """hit@k, ndcg@k (one relevant item) or mrr of ranks (1 is best, 0 not found), float32.

    Example:
        >>> import torch
        >>> ranking_reward(torch.tensor([1, 3, 11, 0]), "ndcg@10").tolist()
        [1.0, 0.5, 0.0, 0.0]
    """
    metric, _, cutoff = name.partition("@")
    is_ranked = ranks > 0
    place = ranks.clamp_min(1).float()
    if metric == "mrr":
        return is_ranked / place
    inside = (is_ranked & (ranks <= int(cutoff))).float()
    return inside if metric == "hit" else inside / (place + 1).log2()
