"""How many tokens a second training takes, and which share of its batches is padding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

#: The entry of a batch that :class:`Throughput` counts: (tokens, places for tokens), whole numbers on the host.
COUNTS = "counts"


def counted(batch: dict[str, Any]) -> dict[str, Any]:
    """``batch`` with its :data:`COUNTS`, made where it is collated, so that a look at them waits for no device."""
    mask = batch["attention_mask"]
    return {**batch, COUNTS: (int(mask.sum()), mask.numel())}


class Throughput(TrainerCallback):
    """Sums over the optimizer's steps: tokens, places for tokens, seconds. Evaluation and saving take none of these.

    Tokens are those of prompts, thoughts and, in supervised training, targets, once a step that uses them; they are
    those that ``--include_num_input_tokens_seen non_padding`` counts over all steps.
    """

    def __init__(self) -> None:
        self._line = torch.zeros(3, dtype=torch.float64)  # since the last line of the log
        self._all = torch.zeros(3, dtype=torch.float64)
        self._since = 0.0

    def begin(self) -> None:
        """A step begins, its batches included."""
        self._since = time.perf_counter()

    def add(self, batch: dict[str, Any]) -> None:
        """Count a batch of the step."""
        self._line[:2] += torch.tensor(batch[COUNTS], dtype=torch.float64)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._line[2] += time.perf_counter() - self._since

    def line(self, mean: Callable[[torch.Tensor], torch.Tensor], processes: int) -> dict[str, float]:
        """``padding``, a share in 0..1, and ``tokens_per_second`` of all processes, since the last call.

        ``mean`` is the mean of a float64 tensor over the processes, on every one of which this is called.
        """
        values = _rates(mean(self._line), processes)
        self._all += self._line
        self._line.zero_()
        return values

    def total(self, mean: Callable[[torch.Tensor], torch.Tensor], processes: int) -> dict[str, float]:
        """The same since the training began or was continued."""
        return _rates(mean(self._all + self._line), processes)


def _rates(sums: torch.Tensor, processes: int) -> dict[str, float]:
    tokens, places, seconds = sums.tolist()
    if not places:
        return {}
    return {"padding": round(1 - tokens / places, 4), "tokens_per_second": round(tokens * processes / seconds, 1)}
