"""A batch cut at its thought columns: pieces, and rows shifted until their thoughts share a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Pieces:
    """A batch while it is being encoded; columns are those of the shifted rows."""

    embeds: Tensor  # [B, L, D]
    mask: Tensor | dict | None  # [B, L], or prepared 4-D masks
    positions: Tensor | None  # [1 or B, L]
    is_thought: Tensor  # bool [B, L]
    reasoner_mask: Tensor | None  # bool [B, L]
    thinks: bool = True  # whether ``is_thought`` may be true anywhere
    ids: Tensor | None = None  # int64 [B, L]; None for a caller's embeddings
    token_types: Tensor | None = None  # int64 [B, L]

    def cut(self, start: int, stop: int) -> dict[str, Any]:
        """Arguments of ``run_base`` for columns [start, stop); a 2-D mask spans the columns before them too."""
        mask = self.mask
        if isinstance(mask, dict):
            mask = {k: v if v is None else v[..., start:stop, :] for k, v in mask.items()}
        elif mask is not None and mask.dim() == 4:
            mask = mask[..., start:stop, :]
        elif mask is not None:
            mask = mask[:, :stop]
        positions = None if self.positions is None else self.positions[..., start:stop]
        ids, types = (x if x is None else x[:, start:stop] for x in (self.ids, self.token_types))
        embeds = self.embeds[:, start:stop]
        return {
            "embeds": embeds,
            "ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "token_type_ids": types,
        }

    def valid(self, stop: int) -> Tensor | None:
        """bool [B, stop] of the tokens before column ``stop`` that factors may attend to."""
        mask = self.mask
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is not None and mask.dim() == 4:
            row = mask[:, 0, stop - 1, :stop]
            mask = row if row.dtype == torch.bool else row == 0
            mask = mask.expand(len(self.embeds), stop)
        valid = None if mask is None else mask[:, :stop].bool()
        if self.reasoner_mask is not None:
            narrowed = self.reasoner_mask[:, :stop] | self.is_thought[:, :stop]
            valid = narrowed if valid is None else narrowed & valid
        return valid

    def shifted(self) -> tuple[Pieces, Tensor | None]:
        """Rows shifted until their first thoughts share a column, and the source [B, L'] of every column.

        Itself and None where they do already, or where prepared masks forbid it.
        """
        mask: Any = self.mask
        prepared = isinstance(mask, dict) or (mask is not None and mask.dim() == 4)
        source = None if prepared else shift_rows(self.is_thought, mask)
        if source is None:
            return self, None
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.is_thought.shape[1], device=source.device)
        narrowed = self.reasoner_mask
        pieces = Pieces(
            embeds=take_columns(self.embeds, source, None),  # a column of zeros has no gradient in some norms
            mask=take_columns(torch.ones_like(self.is_thought) if mask is None else mask, source, 0),
            positions=take_columns(positions.expand(self.is_thought.shape), source, 0),
            is_thought=take_columns(self.is_thought, source, False),
            reasoner_mask=None if narrowed is None else take_columns(narrowed, source, False),
            ids=None if self.ids is None else take_columns(self.ids, source, 0),
            token_types=None if self.token_types is None else take_columns(self.token_types, source, 0),
        )
        return pieces, source


def thought_columns(is_thought: Tensor) -> list[int]:
    return is_thought.any(0).nonzero()[:, 0].tolist()


def shift_rows(is_thought: Tensor, mask: Tensor | None) -> Tensor | None:
    """Source column [B, L'] of every column after shifting rows to a common first thought; None if they agree.

    -1 stands for padding. Rows without a thought keep all their tokens before that column.
    """
    first = is_thought.int().argmax(1)
    has = is_thought.any(1)
    if not has.any() or (first[has] == first[has][0]).all():
        return None
    length = is_thought.shape[1]
    columns = torch.arange(length, device=is_thought.device)
    seen = torch.ones_like(is_thought) if mask is None else mask.bool()
    lowest = torch.where(seen, columns, length).amin(1)
    highest = torch.where(seen, columns, -1).amax(1)
    common = int(first[has].max())
    shift = torch.where(has, common - first, common - 1 - highest)
    empty = highest < 0
    shift[empty], lowest[empty], highest[empty] = 0, common, common
    low, high = int((lowest + shift).min()), int((highest + shift).max())
    source = torch.arange(low, high + 1, device=is_thought.device) - shift[:, None]
    return source.masked_fill((source < 0) | (source >= length), -1)


def take_columns(x: Tensor, source: Tensor, fill: float | None) -> Tensor:
    """Columns of x [B, L, …] by ``source`` [B, L'], ``fill`` where it is -1; None for anything that x holds."""
    rows = torch.arange(len(source), device=source.device)[:, None]
    taken = x[rows, source.clamp_min(0)]
    if fill is None:
        return taken
    return taken.masked_fill((source < 0).view(*source.shape, *[1] * (x.dim() - 2)), fill)


def inverse_columns(source: Tensor, length: int) -> Tensor:
    """Where each original column went: the inverse of :func:`shift_rows`'s map, -1 for dropped padding."""
    inverse = source.new_full((len(source), length + 1), -1)
    columns = torch.arange(source.shape[1], device=source.device).expand_as(source)
    slot = torch.where(source < 0, length, source)
    return inverse.scatter(1, slot, columns)[:, :length]
