"""Numbers that are not finite: where they come from, and that they are not trained on or saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SHOWN = 8


def check_trainable(model: nn.Module) -> None:
    """ValueError for float16 weights that would be trained: an optimizer's steps underflow and overflow in them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"model: expected float32 or bfloat16 weights to train, got float16 in {name}; load it with "
                "dtype=torch.float32 (--fp16 true then computes in float16 beside float32 weights)"
            )


@torch.no_grad()
def check_weights(model: nn.Module, step: int) -> None:
    """ValueError where a weight is not finite, so that none is saved."""
    bad = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if bad:
        raise ValueError(
            f"weights: expected finite numbers to save, got others in {len(bad)} tensors after step {step}, "
            f"e.g. {bad[0]}; the last checkpoint is older"
        )


def rows_at_fault(loss_of: Callable[[dict[str, Any]], torch.Tensor], inputs: dict[str, Any], rows: torch.Tensor) -> str:
    """The rows of a batch whose own loss is not finite, or all of them where none is so alone.

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
    return name_rows(rows[found] if found else rows)


def name_rows(rows: torch.Tensor) -> str:
    """``rows 3, 17`` of the training data, counted from 0, a few of them."""
    numbers = [str(int(row)) for row in rows[:_SHOWN]]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(numbers)}{more} of the training data"
