"""The base model over the pieces of a batch, and the thoughts between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flr.config import FLRConfig

from .backbone import warn_once
from .base import run_base
from .outputs import FLROutput
from .pieces import Pieces, take_columns
from .reasoner import LOSSES, ReasonerOutput
from .verify import traits_of


class Encoder:
    """Runs the base model over the pieces of one batch and makes the thoughts between them."""

    def __init__(
        self,
        model: Any,
        config: FLRConfig,
        inputs: Pieces,
        cache: Any,
        in_pieces: bool,
        keep_cache: bool,
        kwargs: dict[str, Any],
    ) -> None:
        self.model, self.config, self.inputs = model, config, inputs
        self.cache, self.kwargs = cache, kwargs
        self.in_pieces = in_pieces  # each goes on in the cache; else every one begins at column 0, without a cache
        self.keep_cache = keep_cache  # whether the caller wants the cache
        self.hidden: list[Tensor] = []  # last layer, piece by piece
        self.layers: list[tuple[Tensor, ...]] = []  # all layers, when asked for
        self.routers: list[tuple[Tensor, ...]] = []  # logits of every layer's router, when asked for
        self.done = 0  # columns encoded
        self.steps: list[ReasonerOutput] = []
        self.step_rows: list[Tensor] = []
        self.anchor: Tensor | None = None

    def run(self, columns: list[int], stop: int, given: Tensor | None = None) -> None:
        """Encode columns up to ``stop``, a thought in each of ``columns``: ``given`` [B, N, D], or our own."""
        if given is not None and given.shape[:2] != (len(self.inputs.embeds), len(columns)):
            expected = f"[{len(self.inputs.embeds)}, {len(columns)}, D] for these columns"
            raise ValueError(f"thoughts: expected {expected}, got {tuple(given.shape)}")
        for n, column in enumerate(columns):
            self.encode(column)
            self.think(column, None if given is None else given[:, n])
        self.encode(stop, last=True)

    def encode(self, stop: int, last: bool = False) -> None:
        """Encode columns up to ``stop``; ``last`` if nothing follows."""
        start = self.done if self.in_pieces else 0
        if stop <= start:
            return
        goes_on = self.in_pieces or last  # a pass that is done again must leave the caller's cache alone
        arguments = self.inputs.cut(start, stop)
        if goes_on and not last and (kept := self._kept(start, arguments)) is not None:
            states, self.cache = kept
            self.hidden.append(states)
            self.done = stop
            return
        if traits_of(self.model).embeds:
            arguments["ids"] = None
        out, cache = run_base(
            self.model,
            **arguments,
            cache=self.cache if goes_on else None,
            use_cache=self.in_pieces or (last and self.keep_cache),
            **self.kwargs,
        )
        if self.in_pieces and cache is None and not last:
            self.in_pieces = False  # some keep none in training: what follows begins at column 0 again
            warn_once(f"{type(self.model).__name__} keeps no cache here: the prompt is encoded again for every thought")
        if not self.in_pieces:
            self.hidden, self.layers, self.routers = [], [], []
        if goes_on:
            self.cache = cache
        if (routers := getattr(out, "router_logits", None)) is not None:
            self.routers.append(routers)
        self.hidden.append(out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            self.layers.append(out.hidden_states)
        self.done = stop

    def _kept(self, start: int, arguments: dict[str, Any]) -> tuple[Tensor, Any] | None:
        """States and cache of the prompts, where training keeps them and nothing else is wanted of them."""
        kept = self.model._flr_patch.prompt_cache
        if kept is None or start or self.cache is not None or self.kwargs or not torch.is_grad_enabled():
            return None
        ids = arguments["ids"]
        if ids is None or arguments["token_type_ids"] is not None:
            return None
        return kept.states(ids, arguments["attention_mask"], arguments["position_ids"])

    def last_hidden(self) -> Tensor:
        return self.hidden[0] if len(self.hidden) == 1 else torch.cat(self.hidden, 1)

    def all_layers(self, inverse: Tensor | None) -> tuple[Tensor, ...] | None:
        """Hidden states of every layer where they were asked for, columns by ``inverse`` (None: as they are)."""
        if not self.layers:
            return None
        layers = tuple(torch.cat(parts, 1) for parts in zip(*self.layers, strict=True))
        return layers if inverse is None else tuple(take_columns(x, inverse, 0) for x in layers)

    def all_routers(self) -> tuple[Tensor, ...] | None:
        """Router logits [B·L, E] of every layer with experts over all columns, as one pass gives them."""
        if len(self.routers) < 2:
            return self.routers[0] if self.routers else None
        batch = len(self.inputs.embeds)
        layers = zip(*self.routers, strict=True)
        return tuple(torch.cat([x.view(batch, -1, x.shape[-1]) for x in parts], 1).flatten(0, 1) for parts in layers)

    def think(self, column: int, given: Tensor | None = None) -> None:
        """Put the thought, or the embedding ``given`` [B, D], into ``column`` of the rows that have one there."""
        x, config = self.inputs, self.config
        # select, since a number in brackets is a constant to a compiler, and another prompt compiled anew
        rows, here = x.is_thought.select(1, column), x.embeds.select(1, column)
        before = max(column - 1, 0)
        if config.anchor == "none":
            anchor = torch.zeros_like(here)
        elif config.anchor == "token":
            anchor = here
        elif self.anchor is None:
            anchor = x.embeds.select(1, before) if column else torch.zeros_like(here)
        else:  # a later thought keeps the anchor of the one before it
            anchor = torch.where(x.is_thought.select(1, before)[:, None], self.anchor, x.embeds.select(1, before))
        self.anchor = anchor
        embedding = anchor
        if given is not None:
            embedding = given
        elif config.has_reasoner:
            history = self.last_hidden() if self.hidden else x.embeds[:, :0]
            out = self.model.flr(history, x.valid(column) if column else None, column - 1)
            r = torch.nn.functional.dropout(out.thought, config.dropout, self.model.training)
            embedding = anchor + r.to(anchor.dtype)
            self.steps.append(out)
            self.step_rows.append(rows)
        is_column = torch.arange(x.embeds.shape[1], device=rows.device) == column
        x.embeds = torch.where((rows[:, None] & is_column)[..., None], embedding[:, None].to(x.embeds.dtype), x.embeds)

    def output(self, weights: Tensor | None) -> FLROutput | None:
        """The thoughts; ``weights`` [B] are the users' shares in the loss, None for equal ones."""
        return thoughts_made(self.config, self.steps, self.step_rows, weights) if self.steps else None


def thoughts_made(
    config: FLRConfig, steps: list[ReasonerOutput], rows: list[Tensor], weights: Tensor | None
) -> FLROutput:
    """One or more thoughts, made for ``rows`` (bool [B] each), as a forward's output.

    ``weights`` [B] are the users' shares in the loss, None for equal ones.
    """
    seen = torch.stack(rows).to(torch.int64)  # [steps, B]
    count = seen.sum(0).clamp_min(1)
    losses = {name: sum(s.user_losses[name] * n for s, n in zip(steps, seen, strict=True)) / count for name in LOSSES}
    has = seen.any(0)
    dtype = steps[0].thought.dtype
    share = has.to(dtype) / has.sum().clamp_min(1) if weights is None else weights.to(dtype) * has
    total = sum(getattr(config, f"{name}_weight") * (losses[name] * share).sum() for name in LOSSES)
    return FLROutput(steps, losses, has, total)
