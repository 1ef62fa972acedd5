"""Numbers that are not finite: where they come from, and that they are not trained on or saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from flr.model.backbone import may_look

_SHOWN = 8
_UNSEEN = 512  # values that are not looked at


def check_trainable(model: nn.Module) -> None:
    """ValueError for float16 weights that would be trained: an optimizer's steps underflow and overflow in them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"model: expected float32 or bfloat16 weights to train, got float16 in {name}; load it with "
                "dtype=torch.float32 (--fp16 true then computes in float16 beside float32 weights)"
            )


@torch.no_grad()
def check_finite(weights: Mapping[str, torch.Tensor], step: int) -> None:
    """ValueError where a weight is not finite, so that none is saved."""
    bad = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise ValueError(
            f"weights: expected finite numbers to save, got others in {len(bad)} tensors after step {step}, "
            f"e.g. {bad[0]}; the last checkpoint is older"
        )


class LateLook(TrainerCallback):
    """Values of a training that must be finite.

    On the CPU each is looked at when it comes. Those of a device are looked at where the trainer waits for it anyway:
    before it logs, evaluates or saves, and at the end of an epoch. Steps that came meanwhile have spoilt the weights in
    memory, and none on disk.
    """

    def __init__(self) -> None:
        self._finite: list[torch.Tensor] = []
        self._faults: list[Callable[[], str]] = []

    def add(self, value: torch.Tensor, fault: Callable[[], str]) -> None:
        """Watch ``value``; ``fault()`` says what is wrong where it is not finite.

        Raises:
            ValueError: it is not, and lies on the CPU.
        """
        if may_look(value):
            if not bool(torch.isfinite(value).all()):
                raise ValueError(fault())
            return
        self._finite.append(torch.isfinite(value).all())
        self._faults.append(fault)
        if len(self._finite) >= _UNSEEN:
            self.look()

    def look(self) -> None:
        """ValueError for the first value that was not finite."""
        finite, faults = self._finite, self._faults
        self._finite, self._faults = [], []
        if finite and not all(seen := torch.stack(finite).tolist()):
            raise ValueError(faults[seen.index(False)]())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.look()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look()


def rows_at_fault(
    loss_of: Callable[[dict[str, Any]], torch.Tensor], inputs: dict[str, Any], rows: torch.Tensor
) -> torch.Tensor:
    """The numbers of the rows of a batch whose own loss is not finite, or all of them where none is so alone.

    Args:
        loss_of: the loss of a part of the batch.
        inputs: tensors [B, …], and others that are given as they are.
        rows: int64 [B], numbers of the rows in the training data.
    """
    found = []
    for i in range(len(rows)):
        batched = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.ndim and len(x) == len(rows)}
        with torch.no_grad():
            loss = loss_of({**inputs, **{name: x[i : i + 1] for name, x in batched.items()}})
        if not bool(torch.isfinite(loss).all()):
            found.append(i)
    return rows[found] if found else rows


def loss_fault(rows: torch.Tensor) -> str:
    return f"loss: expected a finite number, got another for {name_rows(rows)}"


def norm_fault(norm: torch.Tensor, step: int) -> str:
    found = f"expected a finite norm, got {float(norm)} in step {step}, while the loss was finite"
    return f"gradient: {found}; try a lower learning rate, float32 or bfloat16"


def name_rows(rows: torch.Tensor) -> str:
    """``rows 3, 17`` of the training data, counted from 0, a few of them."""
    numbers = [str(int(row)) for row in rows[:_SHOWN]]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(numbers)}{more} of the training data"
