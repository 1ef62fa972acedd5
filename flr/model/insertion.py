"""Thoughts for batches that bring none: a caller's own prompts, collator and loop go on as they are.

Where a row's thought belongs is where its answer begins: before the first label in training, behind the last token of
a prompt. The batch becomes longer by N columns on the way in, and is the caller's again on the way out: hidden states
and logits come back in the caller's columns, and what predicts the first token of the answer is the state of the last
thought. A cache keeps the N columns; :func:`follow` translates the masks and positions of later calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flr.config import IGNORE, FLRConfig

from .backbone import warn_once
from .base import is_recurrent
from .pieces import Pieces, take_columns

_HOW = "bring thought tokens, or turn insertion off with insert_thought=False"
#: The inputs of a prompt that :func:`append_thoughts` makes longer.
_APPENDED = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")


@dataclass
class Insertion:
    """``count`` thoughts before column ``place`` int64 [B] of rows of ``length`` columns (``length``: behind them)."""

    place: Tensor
    count: int
    length: int

    def source(self, length: int | None = None) -> Tensor:
        """int64 [B, L + N]: the caller's column of every new one, -1 for thoughts; L is ``length`` if given."""
        length = self.length if length is None else length
        columns = torch.arange(length + self.count, device=self.place.device)
        moved = torch.where(columns < self.place[:, None], columns, columns - self.count)
        return moved.masked_fill(self.thoughts(length), -1)

    def thoughts(self, length: int) -> Tensor:
        """bool [B, length + N], the columns of the thoughts."""
        columns = torch.arange(length + self.count, device=self.place.device)
        return (columns >= self.place[:, None]) & (columns < self.place[:, None] + self.count)

    def inverse(self) -> Tensor:
        """int64 [B, L]: the new column that stands for each of the caller's.

        The last thought stands for the token before it, since it is what predicts the token behind it.
        """
        columns = torch.arange(self.length, device=self.place.device)
        return torch.where(columns < self.place[:, None] - 1, columns, columns + self.count)

    def positions(self, given: Tensor) -> Tensor:
        """Positions [B, L + N]: thoughts count on from the token before them, tokens behind them make room."""
        if given.dim() != 2 or given.shape[1] != self.length:
            raise ValueError(f"position_ids: expected [B, {self.length}], got {list(given.shape)}; {_HOW}")
        given = given.expand(len(self.place), self.length)
        rows = torch.arange(len(self.place), device=given.device)
        before = given[rows, (self.place - 1).clamp_min(0)] + (self.place > 0)
        columns = torch.arange(self.length + self.count, device=given.device)
        thought = before[:, None] + columns - self.place[:, None]
        behind = self.count * (columns >= self.place[:, None] + self.count)
        return torch.where(self.thoughts(self.length), thought, take_columns(given, self.source(), 0) + behind)

    def mask(self, given: Tensor) -> Tensor:
        """A 2-D mask [B, length + N] that shows the thoughts; ``given`` may span columns behind the prompt too."""
        taken = take_columns(given, self.source(given.shape[1]), 0)
        return taken.masked_fill(self.thoughts(given.shape[1]), 1)

    def pieces(
        self, embeds: Tensor, mask: Tensor | None, positions: Tensor | None, narrowed: Tensor | None, thought: Tensor
    ) -> Pieces:
        """The batch with ``thought`` [D] where the thoughts will be."""
        source, thoughts = self.source(), self.thoughts(self.length)
        longer = take_columns(embeds, source, 0)
        return Pieces(
            embeds=torch.where(thoughts[..., None], thought.to(longer.dtype), longer),
            mask=None if mask is None else self.mask(mask),
            positions=None if positions is None else self.positions(positions),
            is_thought=thoughts,
            reasoner_mask=None if narrowed is None else take_columns(narrowed, source, False),
        )


def insertion(
    shape: torch.Size, device: torch.device, count: int, mask: Any, labels: Tensor | None, kwargs: dict[str, Any]
) -> Insertion:
    """Where the thoughts of a batch [B, L] go.

    Args:
        shape: [B, L].
        device: of the batch.
        count: N.
        mask: [B, L], 0 for padding on either side; None for none.
        labels: int64 [B, L]; the answer of a row begins with its first label, a row without one is all prompt.
        kwargs: what else the base model is given.

    Raises:
        ValueError: a mask that is not [B, L], or other inputs that have a value for each token.
    """
    batch, length = shape
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected [{batch}, {length}] to insert a thought, got {got}; {_HOW}")
    _refuse_packing(kwargs, shape)
    columns = torch.arange(length, device=device)
    seen = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    place = torch.where(seen, columns + 1, 0).amax(1)
    if labels is not None:
        first = torch.where(seen, columns, length).amin(1)
        answer = torch.where((labels != IGNORE) & (columns > first[:, None]), columns, length).amin(1)
        place = torch.where(answer < length, answer, place)
    return Insertion(place, count, length)


def _refuse_packing(kwargs: dict[str, Any], shape: torch.Size) -> None:
    """Raise where a row holds several sequences, or where tokens have values that nobody can invent for a thought."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "cu_seqlens"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected one sequence a row to insert a thought, got packed ones; {_HOW}")
    if kwargs.get("shift_labels") is not None:
        raise ValueError(f"shift_labels: expected labels, from which the prompt's end is known, got none; {_HOW}")
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            raise ValueError(f"{name}: expected no input with a value for each token, got {list(value.shape)}; {_HOW}")


def refuse_packed_positions(positions: Tensor | None, mask: Tensor | None) -> None:
    """Raise where positions begin anew within a row: several sequences are packed into it."""
    if positions is None or positions.dim() != 2:
        return
    again = positions[:, 1:] <= positions[:, :-1]
    if mask is not None:
        again = again & mask[:, 1:].bool() & mask[:, :-1].bool()
    if bool(again.any()):
        raise ValueError(f"position_ids: expected one sequence a row to insert a thought, got packed ones; {_HOW}")


def warn_of_labels_everywhere(place: Tensor, mask: Tensor | None) -> None:
    """Say once that thoughts which stand behind a row's first token have nothing to think about."""
    first = torch.zeros_like(place) if mask is None else mask.bool().int().argmax(1)
    if bool((place == first + 1).all()):
        warn_once(
            "every row's labels begin with its first tokens, so a thought sees one token of the prompt: give the "
            "prompt the label -100 (TRL: completion_only_loss=True, or a data set of prompts and completions)"
        )


def remember(cache: Any, made: Insertion) -> None:
    """Write into a cache what was inserted, for :func:`follow`."""
    cache._flr_insertion = made


def follow(cache: Any, given: Tensor | None, mask: Any, positions: Tensor | None) -> tuple[Any, Tensor | None]:
    """Mask and positions of a call with tokens ``given`` [B, n, …] that goes on from a cache with inserted thoughts.

    The caller counts its own tokens: a mask [B, past + n] without the thoughts gets their columns, positions make room.
    What counts them already (as ``cache.get_seq_length()`` does) is left alone.
    """
    made: Insertion | None = getattr(cache, "_flr_insertion", None)
    if made is None or given is None or is_recurrent(cache):  # which has neither masks nor positions
        return mask, positions
    past = cache.get_seq_length()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if mask.shape[1] != past + given.shape[1] - made.count:
            return mask, positions
        if len(made.place) != len(mask):
            if not bool((made.place == made.place[0]).all()):
                raise ValueError(
                    f"past_key_values: expected a batch of {len(made.place)} rows as before, got {len(mask)}"
                )
            made = Insertion(made.place[:1].expand(len(mask)), made.count, made.length)
        return made.mask(mask), None if positions is None else positions + made.count
    if positions is not None and mask is None and bool((positions < past).any()):
        positions = positions + made.count
    return mask, positions


def thought_tokens(config: FLRConfig, ids: Tensor, mask: Any = None) -> Tensor:
    """bool [B, L], where ``ids`` are thought tokens; what a 2-D mask (of the last L columns, at least) hides is not."""
    found: Any = ids == config.thought_token_id
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
        found = found & mask[:, mask.shape[1] - ids.shape[1] :].bool()
    return found


def append_thoughts(config: FLRConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Prompts padded on the left, with thought tokens behind them if they bring none and are to have them.

    Args:
        config: of the patched model.
        inputs: input_ids, attention_mask, position_ids [B, L], and reasoner_mask [B, L] if there is one.
    """
    ids = inputs["input_ids"]
    if not (config.insert_thought and config.thought_count) or inputs.get("thought_start") is not None:
        return inputs
    if bool(thought_tokens(config, ids, inputs["attention_mask"]).any()):
        return inputs
    _refuse_packing({k: v for k, v in inputs.items() if k not in _APPENDED}, ids.shape)
    fill = {"input_ids": config.thought_token_id, "attention_mask": 1, "reasoner_mask": False}
    longer = {k: pad(inputs[k], (0, config.num_thoughts), value=v) for k, v in fill.items() if k in inputs}
    behind = torch.arange(1, config.num_thoughts + 1, device=ids.device)
    positions = inputs["position_ids"]
    return {**inputs, **longer, "position_ids": torch.cat([positions, positions[:, -1:] + behind], 1)}
