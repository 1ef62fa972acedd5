"""The members of a group as one packed row behind the prompt's keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone import attention_types, cache_argument, packing_obstacle, takes_positions, warn_once
from .outputs import GroupPrompts


def obstacle(model: Any) -> str | None:
    """Why the members cannot be packed into one row, or None. Sliding windows are in the mask: no obstacle."""
    if (reason := packing_obstacle(model)) is not None:
        return reason
    odd = attention_types(model.config.get_text_config(decoder=True)) - {"full_attention", "sliding_attention"}
    return f"it has layers of type {', '.join(sorted(odd))}" if odd else None


def member_mask(prompt_mask: Tensor, member: Tensor, offset: Tensor, last: int) -> Tensor:
    """bool [B, last, L + c]: what the last of c columns behind the prompt see, the prompt and their own member so far.

    Args:
        prompt_mask: [B, L], not 0 on the prompt's tokens.
        member, offset: int64 [c], whose token a column is, and how many of that member's stand before it.
    """
    own = (member[-last:, None] == member) & (offset[-last:, None] >= offset)
    prompt = prompt_mask[:, None].bool().expand(-1, last, -1)
    return torch.cat([prompt, own.expand(len(prompt_mask), -1, -1)], -1)


class PackedMembers:
    """The columns behind the prompts, what they may see, and the cache they are appended to."""

    def __init__(self, model: Any, cache: DynamicCache, prompt_mask: Tensor, first: Tensor, members: int) -> None:
        self.model, self.cache, self.prompt_mask, self.first, self.members = model, cache, prompt_mask, first, members
        self.config = model.config.get_text_config(decoder=True)
        device = prompt_mask.device
        self.member = torch.zeros(0, dtype=torch.int64, device=device)  # of every column
        self.offset = torch.zeros(0, dtype=torch.int64, device=device)  # tokens since the prompt
        self.positioned = takes_positions(model)
        reason = obstacle(model)
        self.packed = reason is None
        if reason is not None:
            warn_once(f"the prompt's cache is expanded to every group member instead of shared: {reason}")
            cache.batch_repeat_interleave(members)
            self.prompt_mask, self.first = (x.repeat_interleave(members, 0) for x in (prompt_mask, first))

    def run(self, embeds: Tensor) -> Tensor:
        """Hidden states [B, G, n, D] of the next n tokens of every member."""
        batch, members, length, size = embeds.shape
        offset = self.offset.max() + 1 if len(self.offset) else self.offset.new_zeros(())
        offsets = offset + torch.arange(length, device=embeds.device)
        if not self.packed:
            self.offset = torch.cat([self.offset, offsets])
            ones = self.prompt_mask.new_ones(len(self.prompt_mask), len(self.offset))
            mask: Any = torch.cat([self.prompt_mask, ones], 1)
            rows = batch * members
        else:
            member = torch.arange(members, device=embeds.device).repeat_interleave(length)
            offsets = offsets.repeat(members)
            self.member, self.offset = torch.cat([self.member, member]), torch.cat([self.offset, offsets])
            mask = self._masks(member_mask(self.prompt_mask, self.member, self.offset, len(offsets)), embeds.dtype)
            rows = batch
        out = self.model.base_model(
            inputs_embeds=embeds.reshape(rows, -1, size),
            attention_mask=mask,
            **cache_argument(self.model.base_model, self.cache),
            use_cache=True,
            return_dict=True,
            **({"position_ids": self.first + offsets} if self.positioned else {}),
        )
        return out.last_hidden_state.view(batch, members, length, size)

    def prompts(self, thoughts: int, steps: int, hidden: Tensor, position_ids: Tensor) -> GroupPrompts:
        """The prompts and thoughts alone; the last began a run of ``steps`` tokens, ``hidden`` [B, G, D] follows it."""
        length, device = self.prompt_mask.shape[1], hidden.device
        earlier = torch.arange(length + (thoughts - 1) * self.members, device=device)
        last = len(earlier) + torch.arange(self.members, device=device) * steps
        kept = torch.cat([earlier, last])
        plain = DynamicCache()
        layers: list[Any] = list(self.cache.layers)
        for n, layer in enumerate(layers):
            plain.update(layer.keys.detach()[:, :, kept], layer.values.detach()[:, :, kept], n)
        return GroupPrompts(plain, self.member[kept[length:] - length], hidden.detach(), self.prompt_mask, position_ids)

    def _masks(self, full: Tensor, dtype: torch.dtype) -> Any:
        """4-D masks of ``full`` [B, q, L + c]; by layer type where they differ."""

        def finished(mask: Tensor) -> Tensor:
            if self.config._attn_implementation != "eager":
                return mask[:, None]
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            return zeros.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]

        types = attention_types(self.config)
        if types == {"full_attention"}:
            return finished(full)
        columns = torch.cat([torch.arange(-self.prompt_mask.shape[1], 0, device=full.device), self.offset])
        offsets = self.offset[-full.shape[1] :, None]
        near = finished(full & (offsets - columns < self.config.sliding_window))
        return near if len(types) == 1 else {"full_attention": finished(full), "sliding_attention": near}
