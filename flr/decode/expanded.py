"""Every hypothesis as a row with a cache of its own, for models that cannot be packed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from flr.model.backbone import cache_argument

from .session import model_states, refuse_every, slots


class ExpandedSession:
    """Every hypothesis is a row with a cache of its own."""

    reads_runs = False

    def __init__(
        self,
        model: nn.Module,
        past: Cache,
        prepared: Mapping[str, torch.Tensor],
        hidden: bool,
        several: bool = True,
    ) -> None:
        self.model, self.hidden = model, hidden
        self.several = several  # whether the cache takes several tokens at a time
        self.cache = past
        self.mask = prepared["attention_mask"]  # [B·w, L + t]
        self.positioned = "position_ids" in prepared
        self.next_position = prepared["attention_mask"].long().sum(1)  # [B]
        if self.positioned:
            self.next_position = prepared["position_ids"][:, -1] + 1
        self.rows = len(self.mask)
        # tokens of each hypothesis, int64 [B, w, t] padded at the end; None once steps were of one token
        self.paths: torch.Tensor | None = self.mask.new_zeros((self.rows, 1, 0), dtype=torch.int64)
        self.depth = self.mask.new_zeros((self.rows, 1), dtype=torch.int64)

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        refuse_every(every)
        if lengths is not None:
            return self._again(tokens, parents, lengths)
        rows, width = tokens.shape
        before = len(self.mask) // self.rows
        source = (torch.arange(rows, device=tokens.device)[:, None] * before + parents).flatten()
        self.cache.reorder_cache(cast(torch.LongTensor, source))
        self.mask = torch.cat([self.mask[source], self.mask.new_ones(rows * width, 1)], dim=1)
        self.depth, self.paths = self.depth.gather(1, parents) + 1, None
        user = torch.arange(rows, device=tokens.device).repeat_interleave(width)
        states, self.cache = self._run(self.cache, self.mask, tokens.reshape(-1, 1), self.depth.flatten() - 1, user)
        return states.view(rows, width, -1)

    def _again(self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Steps of several tokens: hypotheses are encoded anew from the prompt's cache, those of one length at a time.

        Caches of different lengths do not go together without padding, which sliding windows would count.
        """
        earlier = self.paths
        if earlier is None:
            raise ValueError("lengths: expected None, as in the session's earlier steps")
        rows, width = lengths.shape
        depth = self.depth.gather(1, parents)
        owner, offset = slots(lengths, tokens.shape[1])
        longest = int((depth + lengths).max())
        before = earlier.gather(1, parents[..., None].expand(-1, -1, earlier.shape[-1]))[..., :longest]
        paths = before.new_zeros(rows, width, longest + 1)  # the last column takes padding
        paths[..., : before.shape[-1]] = before
        place = torch.where(offset >= 0, depth.gather(1, owner) + offset, longest)
        paths[torch.arange(rows, device=tokens.device)[:, None], owner, place] = tokens
        self.paths, self.depth = paths[..., :longest], depth + lengths
        out: torch.Tensor | None = None
        for length in self.depth[lengths > 0].unique().tolist():
            user, column = ((self.depth == length) & (lengths > 0)).nonzero(as_tuple=True)
            cache = copy.deepcopy(self.cache)
            cache.reorder_cache(cast(torch.LongTensor, user))
            path, start = self.paths[user, column, :length], torch.zeros_like(user)
            for part in path.split(length if self.several else 1, dim=1):
                seen = self.mask.new_ones(len(user), int(start[0]) + part.shape[1])
                mask = torch.cat([self.mask[user], seen], dim=1)
                states, cache = self._run(cache, mask, part, start, user)
                start = start + part.shape[1]
            if out is None:
                out = states.new_zeros(rows, width, states.shape[-1])
            out[user, column] = states[:, -1]
        if out is None:
            raise ValueError("lengths: expected a hypothesis with new tokens, got none")
        return out

    def _run(
        self, cache: Cache, mask: torch.Tensor, tokens: torch.Tensor, depth: torch.Tensor, user: torch.Tensor
    ) -> tuple[torch.Tensor, Cache]:
        """States of tokens [R, n] of the users [R], whose first stands ``depth`` [R] behind the prompt."""
        positions = (self.next_position[user] + depth)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, **cache_argument(self.model, cache)}
        if self.positioned:
            arguments["position_ids"] = positions
        return model_states(self.model, self.hidden, arguments)

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        kept = copy.deepcopy(self.cache), self.mask, self.depth, self.paths
        if self.depth.any():
            raise ValueError("tree: expected a session without steps, got one that has made some")
        states, start_of_level = [], 0
        for level in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(depths)) + 1):
            within = np.maximum(parents[level] - start_of_level, 0)  # column of the parent among the previous level
            start_of_level = int(level[0])
            both = (torch.as_tensor(x.astype(np.int64), device=self.mask.device) for x in (tokens[level], within))
            states.append(self.step(*(x.expand(self.rows, -1) for x in both)))
        self.cache, self.mask, self.depth, self.paths = kept
        return torch.cat(states, dim=1)

    def select(self, users: torch.Tensor) -> None:
        width = len(self.mask) // self.rows
        source = (users[:, None] * width + torch.arange(width, device=users.device)).flatten()
        self.cache.reorder_cache(cast(torch.LongTensor, source))
        self.mask, self.depth, self.next_position = self.mask[source], self.depth[users], self.next_position[users]
        self.paths = None if self.paths is None else self.paths[users]
        self.rows = len(users)
