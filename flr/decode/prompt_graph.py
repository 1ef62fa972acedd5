"""The prefill of prompts as a CUDA graph, into the tensors of a search of fixed shapes.

A prefill of a patched model is two forwards and the reasoner, some 100 kernels a layer: of an evaluation's time most
goes into launching them. Prompts are padded on the left to the length that the search has, users to as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from flr.model.backbone import cache_of, causal_lm, fixed_shapes, is_patched, mixes, takes_positions
from flr.model.verify import traits_of

from .prompts import prefill_arguments, prepare_inputs
from .session import lm_head_inputs

#: What a prompt may consist of, and what columns before its first are filled with (ids: with tokens of its own).
_FILL = {"input_ids": None, "attention_mask": 0, "position_ids": 0, "reasoner_mask": False}


def thoughts_of(model: nn.Module) -> int:
    """How many thought tokens a prompt ends with."""
    lm = causal_lm(model)
    return lm._flr_patch.config.num_thoughts if is_patched(lm) and lm._flr_patch.config.thought_count else 0


def prompts_to_capture(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """The prepared inputs of a prefill that can be captured; None for any other.

    Raises:
        ValueError: as :func:`flr.decode.prompts.prepare_inputs`.
    """
    traits = traits_of(model)
    if mixes(model) or not takes_positions(model) or not (traits.steps and traits.left_padding):
        return None
    prepared = prepare_inputs(model, inputs)
    if any(name not in _FILL or not isinstance(x, torch.Tensor) for name, x in prepared.items()):
        return None
    ids, count = prepared["input_ids"], thoughts_of(model)
    if count:
        is_thought = ids == causal_lm(model)._flr_patch.config.thought_token_id
        at_the_end = is_thought[:, -count:].all() & (is_thought.sum() == count * len(ids))
        if ids.shape[1] <= count or not bool(at_the_end):
            return None
    return prepared


def padded(prepared: Mapping[str, torch.Tensor], users: int, length: int) -> dict[str, torch.Tensor]:
    """Prompts [B, L] as [users, length]: padded on the left, and more users like the first."""
    made = {}
    for name, x in prepared.items():
        fill = _FILL[name]
        left = length - x.shape[1]
        before = x[:, :1].expand(-1, left) if fill is None else torch.full_like(x[:, :1], fill).expand(-1, left)
        x = torch.cat([before, x], 1)
        made[name] = torch.cat([x, x[:1].expand(users - len(x), -1)])
    return made


class PromptGraph:
    """The prefill of prompts of one shape; ``take`` is given its states and its cache, inside the graph, too."""

    def __init__(
        self,
        prepared: Mapping[str, torch.Tensor],
        users: int,
        length: int,
        hidden: bool,
        take: Callable[[torch.Tensor, Cache, dict[str, torch.Tensor]], None],
    ) -> None:
        self.users, self.length, self.hidden, self.take = users, length, hidden, take
        self.inputs = padded(prepared, users, length)
        self._replay: Callable[[], None] | None = None

    def load(self, prepared: Mapping[str, torch.Tensor]) -> None:
        for name, x in padded(prepared, self.users, self.length).items():
            self.inputs[name].copy_(x)

    def run(self, model: nn.Module) -> None:
        """One by one where nothing was captured."""
        if self._replay is not None:
            self._replay()
            return
        start = {"thought_start": self.length - n} if (n := thoughts_of(model)) else {}
        with fixed_shapes(), lm_head_inputs(model, skip=False) as hidden:
            out = model(**self.inputs, **start, **prefill_arguments(model))
        self.take(hidden[-1][:, -1] if self.hidden else out.logits[:, -1], cache_of(out), self.inputs)

    def capture(self, model: nn.Module, record: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """``record`` captures what it is given, and returns what runs it again."""
        self.run(model)  # compile
        self._replay = record(lambda: self.run(model))
