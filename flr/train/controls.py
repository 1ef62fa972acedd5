"""What latent GRPO adapts from step to step: the weight of the KL, the size of the noise, each user's objective.

    β ← β · exp(η · clip(KL / target - 1, -1, 1))              KL from the model given
    σ ← σ · exp(η · clip((target - share) / target, -1, 1))    share of users whose members' rewards differ
    λ_u = 1 - (1 - λ) · min(1, s_u / mean s)                   s_u: spread of user u's rewards

The first is a dual step on log β, which keeps it positive. Where nobody's ranking changes, noise is too small to be
rewarded; where everybody's does, it is larger than it need be. A user whose members are all rewarded alike has nothing
to explore: its objective is then the likelihood alone, λ_u = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

RATE = 0.1  # η
#: How far β and σ may go from where they began, in either direction.
KL_RANGE, NOISE_RANGE = 1e4, 10.0


def user_weights(rewards: Tensor, least: float, adaptive: bool, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """λ_u [B] of rewards [B, G].

    Args:
        least: λ in [0, 1].
        adaptive: False for λ everywhere.
        mean: of spreads [B], over the users of all processes.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> user_weights(rewards, 0.2, True, torch.mean)
        tensor([1.0000, 0.4000, 0.2000])
    """
    if not adaptive:
        return torch.full_like(rewards[:, 0], least)
    spread = rewards.std(1, unbiased=False)
    whole = mean(spread)
    share = torch.where(whole > 0, spread / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)
    return 1 - (1 - least) * share.clamp_max(1)


class Controls(TrainerCallback, ExportableState):
    """β and σ of a run, as tensors that never wait for a device; saved with checkpoints, taken up again from them.

    Args:
        kl_weight, noise_scale: where they begin.
        kl_target, noise_target: what they are adapted for; None leaves them as they are.
        total: a sum over the processes.
    """

    def __init__(
        self,
        kl_weight: float,
        noise_scale: float,
        kl_target: float | None,
        noise_target: float | None,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        self._begun = {"kl_weight": kl_weight, "noise_scale": noise_scale}
        self._targets = {"kl_weight": kl_target, "noise_scale": noise_target}
        self._range = {"kl_weight": KL_RANGE, "noise_scale": NOISE_RANGE}
        self._total = total
        self.values: dict[str, Tensor] = {name: torch.tensor(value) for name, value in self._begun.items()}
        self._sums: Tensor | None = None  # KL, users whose rewards differ, users

    @property
    def adapts(self) -> bool:
        """Whether anything is adapted."""
        return any(target is not None for target in self._targets.values())

    def on(self, name: str, device: torch.device) -> Any:
        """The value ``name``: a number where it stays as it is, a tensor on ``device`` where it is adapted."""
        if self._targets[name] is None:
            return self._begun[name]
        self.values[name] = self.values[name].to(device)
        return self.values[name]

    def observe(self, kl: Tensor, rewards: Tensor) -> None:
        """A micro-batch: KL [B] and rewards [B, G]."""
        if self.adapts:
            kl = kl.detach()
            differ = (rewards.amax(1) > rewards.amin(1)).to(kl.dtype)
            sums = torch.stack([kl.sum(), differ.sum(), torch.full_like(kl[0], len(kl))])
            self._sums = sums if self._sums is None else self._sums + sums

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adapt to what the micro-batches of the step showed; nothing in a step without new rewards."""
        if self._sums is None:
            return
        kl, differ, users = self._total(self._sums)
        self._sums = None
        target = self._targets["kl_weight"]
        if target is not None:
            self._move("kl_weight", kl / users / target - 1)
        target = self._targets["noise_scale"]
        if target is not None:
            self._move("noise_scale", (target - differ / users) / target)

    def _move(self, name: str, error: Tensor) -> None:
        start, factor = self._begun[name], self._range[name]
        value = self.values[name].to(error) * (RATE * error.clamp(-1, 1)).exp()
        self.values[name] = value.clamp(start / factor, start * factor)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint's values, which ``Trainer`` has read into ``state``."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and self.adapts:
            self.values = {name: torch.tensor(float(saved["attributes"][name])) for name in self.values}

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``."""
        return {"args": {}, "attributes": {name: float(value) for name, value in self.values.items()}}
