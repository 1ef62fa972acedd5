"""Every sequence encoded from its first token, for models whose cache does not continue a prompt.

The slow way, and the one that any causal LM can go: no cache, no padding. A patched model thinks anew in every pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from flr.model.backbone import causal_lm, forward_parameters

from .session import lm_head_inputs, refuse_every

#: Tokens of one forward.
_TOKENS = 1 << 14


class RecomputedSession:
    """Hypotheses are token sequences, encoded in groups of one length; see ``Session``."""

    reads_runs = False

    def __init__(self, model: nn.Module, prepared: Mapping[str, Any], hidden: bool = False) -> None:
        self.model, self.hidden = model, hidden
        self.prompts = {k: v for k, v in prepared.items() if k not in ("attention_mask", "position_ids")}
        self.mask = prepared["attention_mask"] != 0  # [B, L]
        _refuse_gaps(self.mask, prepared.get("position_ids"))
        takes = forward_parameters(type(causal_lm(model)).forward)
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        if "use_cache" in takes:
            self.options["use_cache"] = False
        rows = len(self.mask)
        self.paths = torch.zeros(rows, 1, 0, dtype=torch.int64, device=self.mask.device)  # padded at the end
        self.depth = torch.zeros(rows, 1, dtype=torch.int64, device=self.mask.device)

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        refuse_every(every)
        width = parents.shape[1]
        added = torch.ones_like(parents) if lengths is None else lengths
        begin = added.cumsum(1) - added
        depth, before = self.depth.gather(1, parents), self.paths.shape[-1]
        room = torch.arange(before + tokens.shape[1], device=tokens.device)
        earlier = self.paths.gather(1, parents[..., None].expand(-1, -1, before))
        earlier = torch.nn.functional.pad(earlier, (0, tokens.shape[1]))
        new = (begin[..., None] + room - depth[..., None]).clamp(0, tokens.shape[1] - 1)  # column in ``tokens``
        mine = tokens[:, None].expand(-1, width, -1).gather(2, new)
        self.depth = depth + added
        self.paths = torch.where(room < depth[..., None], earlier, mine)[..., : int(self.depth.max())]
        return self._states(added > 0)

    def root(self) -> torch.Tensor:
        """States [B, …] after the prompts."""
        return self._states(torch.ones_like(self.depth, dtype=torch.bool))[:, 0]

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        if self.depth.any():
            raise ValueError("tree: expected a session without steps, got one that has made some")
        paths = np.zeros((len(tokens), int(depths.max())), dtype=np.int64)
        for node, (token, parent, depth) in enumerate(zip(tokens, parents, depths, strict=True)):
            if depth > 1:
                paths[node] = paths[parent]
            paths[node, depth - 1] = token
        rows, device = len(self.mask), self.mask.device
        kept = self.paths, self.depth
        self.paths = torch.as_tensor(paths, device=device).expand(rows, -1, -1)
        self.depth = torch.as_tensor(depths.astype(np.int64), device=device).expand(rows, -1)
        states = self._states(torch.ones_like(self.depth, dtype=torch.bool))
        self.paths, self.depth = kept
        return states

    def select(self, users: torch.Tensor) -> None:
        rows = len(self.mask)
        self.prompts = {k: _rows(v, users, rows) for k, v in self.prompts.items()}
        self.mask, self.paths, self.depth = self.mask[users], self.paths[users], self.depth[users]

    def _states(self, wanted: torch.Tensor) -> torch.Tensor:
        """States [B, w, …] after the hypotheses that are ``wanted`` bool [B, w]; undefined for others."""
        prompt = self.mask.sum(1)
        sizes = torch.stack([prompt[:, None].expand_as(self.depth), self.depth])  # prompt and path, [2, B, w]
        out: torch.Tensor | None = None
        for length, depth in sizes[:, wanted].unique(dim=1).T.tolist():
            user, column = (wanted & (sizes[0] == length) & (self.depth == depth)).nonzero(as_tuple=True)
            for part in torch.arange(len(user), device=user.device).split(max(1, _TOKENS // (length + depth))):
                states = self._run(user[part], self.paths[user[part], column[part], :depth], length)
                if out is None:
                    out = states.new_zeros(*wanted.shape, states.shape[-1])
                out[user[part], column[part]] = states
        if out is None:
            raise ValueError("lengths: expected a hypothesis with new tokens, got none")
        return out

    def _run(self, users: torch.Tensor, paths: torch.Tensor, length: int) -> torch.Tensor:
        """States [R, …] after prompts of ``length`` tokens and the paths int64 [R, n]."""
        rows, width = self.mask.shape
        arguments: dict[str, Any] = {}
        for name, value in self.prompts.items():
            value = _rows(value, users, rows)
            if isinstance(value, torch.Tensor) and value.shape[1:2] == (width,) and name != "thoughts":
                value = value[:, width - length :]  # padding stood on the left
                behind = paths if name == "input_ids" else value.new_zeros(paths.shape)
                value = torch.cat([value, behind], 1)
            arguments[name] = value
        with lm_head_inputs(self.model, skip=self.hidden) as seen:
            out = self.model(**arguments, **self.options)
        return seen[-1][:, -1] if self.hidden else out.logits[:, -1]


def _refuse_gaps(mask: torch.Tensor, positions: torch.Tensor | None) -> None:
    """ValueError for prompts that are not their tokens alone, one after the other: no mask, no positions are passed."""
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("attention_mask: expected padding before the prompt alone where it is encoded anew, got gaps")
    if positions is not None and bool((positions != mask.cumsum(1) - 1)[mask].any()):
        raise ValueError("position_ids: expected 0, 1, 2, … where prompts are encoded anew, got others")


def _rows(value: Any, rows: torch.Tensor, count: int) -> Any:
    """The rows of a tensor that has one for each of ``count`` users."""
    return value[rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == count else value
