"""Grouped-query attention under a mask without a copy of keys and values for every query head.

Under a mask transformers' sdpa attention repeats keys and values once a query head (unless there is a single query
token). Here the g heads that share a key head become g rows of one head instead: queries [B, g·H, n, d] are
[B, H, g·n, d], which is the same memory, and the mask's rows repeat. Every row is what it was, so the result is, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_entry import entered, original
from .merged_attention import folded

_ONE_HEAD: Any = SimpleNamespace(is_causal=False)  # in the place of an attention module: its heads are not grouped


def folded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, folded where that pays; the arguments and the result are its own."""
    groups = getattr(module, "num_key_value_groups", 1)
    folds = groups > 1 and attention_mask is not None and options.get("position_bias") is None
    if attention_mask is None or not folds or not _pays(groups, query, key, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, count, size = query.shape
    rows = folded(query, groups)
    mask = _repeated(attention_mask, groups)
    out, _ = sdpa_attention_forward(_ONE_HEAD, rows, key, value, mask, **options)  # [B, g·n, H, d]
    out = out.unflatten(1, (groups, count)).permute(0, 2, 3, 1, 4)  # [B, n, H, g, d]
    return out.reshape(batch, count, heads, size), None


def _repeated(mask: Tensor, groups: int) -> Tensor:
    """The rows of ``mask`` [B, 1, n, c] for every head of a group, [B, 1, g·n, c], one copy for all layers.

    Memory between rows stays as it is, since kernels want rows aligned.
    """
    if torch.compiler.is_compiling():
        return mask.repeat(1, 1, groups, 1)
    known: dict[int, Tensor] = mask.__dict__.setdefault("_flr_repeated", {})  # goes with the mask
    if groups not in known:
        batch, _, count, columns = mask.shape
        row = max(mask.stride(-2), columns)
        whole = mask.new_empty(batch, 1, groups * count, row)[..., :columns]
        known[groups] = whole.copy_(mask.repeat(1, 1, groups, 1))
    return known[groups]


def _pays(groups: int, query: Tensor, key: Tensor, mask: Tensor) -> bool:
    """Whether the mask is the same for all heads, and its copies are smaller than those of keys and values."""
    count, copies = query.shape[2], 2 * (groups - 1) * key.shape[1] * key.shape[3] * key.element_size()
    return count > 1 and mask.dim() == 4 and mask.shape[1] == 1 and groups * count * mask.element_size() < copies


@contextlib.contextmanager
def folded_heads() -> Iterator[None]:
    """Models that this thread runs inside fold their heads; those of other threads do as ever.

    Nothing may be run again in a backward that was run inside (gradient checkpointing). A compiler that traces the call
    itself knows no threads: heads are not folded in its program. An attention of that name that is not transformers'
    own stays.
    """
    if torch.compiler.is_compiling() or original("sdpa") is not sdpa_attention_forward:
        yield
        return
    with entered("sdpa", folded_attention):
        yield
