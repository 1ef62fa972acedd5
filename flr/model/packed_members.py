"""The members of a group as one packed row behind the prompt's keys and values.

A mask keeps them apart, or they attend to the prompt and to themselves in two calls (:mod:`.shared_prompt`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone import attention_types, packing_obstacle, takes_positions, warn_once
from .base import masks_by_type, right_padded, run_base
from .folded_heads import folded_heads
from .outputs import GroupPrompts
from .shared_prompt import MemberRows, shares
from .verify import traits_of

#: Members' tokens × prompt's × width, from which two calls are faster on a CPU (docs/log.md).
_LARGE = 1 << 25


def obstacle(model: Any) -> str | None:
    """Why the members cannot be packed into one row, or None. Sliding windows are in the mask: no obstacle."""
    if (reason := packing_obstacle(model)) is not None:
        return reason
    odd = attention_types(model.config.get_text_config(decoder=True)) - {"full_attention", "sliding_attention"}
    if odd:
        return f"it has layers of type {', '.join(sorted(odd))}"
    return None if traits_of(model).packing else f"{type(model).__name__} takes no 4-D mask"


def member_mask(prompt_mask: Tensor, member: Tensor, offset: Tensor, last: int) -> Tensor:
    """bool [B, last, L + c]: what the last of c columns behind the prompt see, the prompt and their own member so far.

    Args:
        prompt_mask: [B, L], not 0 on the prompt's tokens.
        member, offset: int64 [c], whose token a column is, and how many of that member's stand before it.
    """
    own = (member[-last:, None] == member) & (offset[-last:, None] >= offset)
    prompt = prompt_mask[:, None].bool().expand(-1, last, -1)
    return torch.cat([prompt, own.expand(len(prompt_mask), -1, -1)], -1)


def shares_prompt(model: Any) -> bool:
    """Whether a group's members can go on from the keys and values of one prompt, gradients included."""
    traits = traits_of(model)
    return traits.plain_cache and traits.gradients and traits.left_padding


def encode_alone(model: Any, embeds: Tensor, ids: Tensor | None, mask: Tensor) -> Tensor:
    """Hidden states [R, L, D] of rows encoded from their first token: without a cache, padded on the right.

    Args:
        embeds: [R, L, D]. ids: int64 [R, L] or None, as for ``run_base``. mask: [R, L], not 0 on tokens.
    """
    columns, length = right_padded(mask)
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    seen = (torch.arange(mask.shape[1], device=mask.device) < length[:, None]).long()
    ids = None if ids is None else ids[rows, columns]
    out, _ = run_base(model, embeds[rows, columns], ids, attention_mask=seen)
    return out.last_hidden_state[rows, columns.argsort(1)]


def encode_prompts(
    model: Any,
    embeds: Tensor,
    ids: Tensor | None,
    mask: Tensor,
    position_ids: Tensor,
    cached: bool = True,
    tokens: Tensor | None = None,
) -> tuple[Tensor, DynamicCache | None]:
    """Hidden states [B, L, D] of prompts, and their keys and values; None where these are not all, or not ``cached``.

    Args:
        embeds: [B, L, D]. ids: int64 [B, L] or None, as for ``run_base``.
        mask, position_ids: int64 [B, L].
        tokens: int64 [B, L] of a training step, for a cache of prompts; None for none.
    """
    if not (cached and shares_prompt(model)):
        return encode_alone(model, embeds, ids, mask), None
    kept = model._flr_patch.prompt_cache
    if kept is not None and tokens is not None and (found := kept.states(tokens, mask, position_ids)) is not None:
        return found
    cache = DynamicCache()  # plain layers: sliding ones must keep the whole prompt, the mask has the window
    positions = {"position_ids": position_ids} if takes_positions(model) else {}
    out, cache = run_base(model, embeds, ids, cache=cache, use_cache=True, attention_mask=mask, **positions)
    return out.last_hidden_state, cache


@dataclass
class Prompt:
    """B encoded prompts of L tokens; ``ids`` and ``cache`` are None where they are not needed or not to be had."""

    embeds: Tensor  # [B, L, D]
    ids: Tensor | None  # int64 [B, L]
    cache: DynamicCache | None
    mask: Tensor  # int64 [B, L]
    next_position: Tensor  # int64 [B, 1], of the first token behind it


class PackedMembers:
    """The columns behind the prompts, what they may see, and the cache they are appended to.

    Args:
        model: causal LM.
        prompt: B of them.
        members: G.
        longest: tokens that a member will have at most.

    Attributes:
        packed: whether the members of a prompt are one row.
        shared: they attend to the prompt and to themselves in two calls; None where a mask keeps them apart.
    """

    def __init__(self, model: Any, prompt: Prompt, members: int, longest: int) -> None:
        self.model, self.members, self._cache = model, members, prompt.cache
        self.prompt_mask, self.first = prompt.mask, prompt.next_position
        self.config = model.config.get_text_config(decoder=True)
        device = self.prompt_mask.device
        self.member = torch.zeros(0, dtype=torch.int64, device=device)  # of every column
        self.offset = torch.zeros(0, dtype=torch.int64, device=device)  # tokens since the prompt
        self.positioned = takes_positions(model)
        self.shared: MemberRows | None = None
        batch, length = self.prompt_mask.shape
        size = batch * members * longest * length * prompt.embeds.shape[-1]
        faster = device.type == "cpu" and size >= _LARGE  # on others it has not been measured
        compiling = torch.compiler.is_compiling()  # a compiler of the whole step knows no threads, so it gets the mask
        if self._cache is not None and not compiling and shares(model, faster, length + longest):
            self.shared = MemberRows(model, self._cache, self.prompt_mask, members)
        reason = None if self.shared is not None else obstacle(model)
        self.packed = reason is None and self._cache is not None
        self.embeds: Tensor | None = None  # [B·G, L + t, D] of members that are encoded from their first token
        self.ids: Tensor | None = None
        if self.packed:
            return
        self.prompt_mask, self.first = (x.repeat_interleave(members, 0) for x in (self.prompt_mask, self.first))
        if self._cache is not None:
            warn_once(f"the prompt's cache is expanded to every group member instead of shared: {reason}")
            self._cache.batch_repeat_interleave(members)
        else:
            self.embeds = prompt.embeds.repeat_interleave(members, 0)
            self.ids = None if prompt.ids is None else prompt.ids.repeat_interleave(members, 0)

    @property
    def cache(self) -> DynamicCache | None:
        """Keys and values of the prompts and, behind them, of all columns; None where there are none."""
        return self._cache if self.shared is None else self.shared.joined()

    def run(self, embeds: Tensor, ids: Tensor) -> Tensor:
        """Hidden states [B, G, n, D] of the next n tokens of every member, int64 [B, G, n]."""
        batch, members, length, size = embeds.shape
        offset = self.offset.max() + 1 if len(self.offset) else self.offset.new_zeros(())
        offsets = offset + torch.arange(length, device=embeds.device)
        rows = batch if self.packed else batch * members
        embeds, flat = embeds.reshape(rows, -1, size), ids.reshape(rows, -1)
        if self.packed:
            member = torch.arange(members, device=embeds.device).repeat_interleave(length)
            offsets = offsets.repeat(members)
            self.member = torch.cat([self.member, member])
        self.offset = torch.cat([self.offset, offsets])
        if self.embeds is not None:
            self.embeds = torch.cat([self.embeds, embeds.to(self.embeds.dtype)], 1)
            self.ids = None if self.ids is None else torch.cat([self.ids, flat], 1)
            hidden = encode_alone(self.model, self.embeds, self.ids, self._rows_mask())[:, -length:]
            return hidden.view(batch, members, length, size)
        cache: Any = self._cache
        attending: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.shared is not None:
            cache, mask, attending = self.shared.cache, self.shared.placeholder, self.shared.attending(length)
        elif self.packed:
            seen = member_mask(self.prompt_mask, self.member, self.offset, len(offsets))
            mask, attending = self._masks(seen, embeds.dtype), folded_heads()
        else:
            mask = self._rows_mask()
        with attending:
            out, _ = run_base(
                self.model,
                embeds,
                None if traits_of(self.model).embeds else flat,
                cache=cache,
                use_cache=True,
                attention_mask=mask,
                **({"position_ids": self.first + offsets} if self.positioned else {}),
            )
        return out.last_hidden_state.view(batch, members, length, size)

    def _rows_mask(self) -> Tensor:
        """int64 [B·G, L + c] of members that are rows of their own."""
        return torch.cat([self.prompt_mask, self.prompt_mask.new_ones(len(self.prompt_mask), len(self.offset))], 1)

    def prompts(self, thoughts: int, steps: int, hidden: Tensor, position_ids: Tensor) -> GroupPrompts:
        """The prompts and thoughts alone; the last began a run of ``steps`` tokens, ``hidden`` [B, G, D] follows it."""
        length, device = self.prompt_mask.shape[1], hidden.device
        earlier = torch.arange(length + (thoughts - 1) * self.members, device=device)
        last = len(earlier) + torch.arange(self.members, device=device) * steps
        kept = torch.cat([earlier, last])
        plain, cache = DynamicCache(), self.cache
        assert cache is not None
        layers: list[Any] = list(cache.layers)
        for n, layer in enumerate(layers):
            plain.update(layer.keys.detach()[:, :, kept], layer.values.detach()[:, :, kept], n)
        return GroupPrompts(plain, self.member[kept[length:] - length], hidden.detach(), self.prompt_mask, position_ids)

    def _masks(self, full: Tensor, dtype: torch.dtype) -> Any:
        """4-D masks of ``full`` [B, q, L + c]; by layer type where they differ."""
        prompt = torch.arange(-self.prompt_mask.shape[1], 0, device=full.device)
        return masks_by_type(self.config, full, torch.cat([prompt, self.offset]), dtype)
