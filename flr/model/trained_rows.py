"""PEFT's layer for chosen rows of a token table, computed without a copy of the table.

PEFT (``trainable_token_indices``) writes the trained rows into a copy of the table at every use, and the backward makes
a gradient of the whole table to take those rows from. A model of 150,000 tokens and 896 channels so moves some
gigabytes a step, for rows that are a thousandth of them. Here the table is used as it is, and the trained rows beside
it:

    embedding   e_t = trained[place_t] where t has a place, else table[t]
    lm_head     the table's logits, with those of the trained rows written over their own columns

The values are the same; adapters are saved, loaded and merged by PEFT.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .token_table import TokenTable, has_rows, is_whole, with_trained


class _Places(NamedTuple):
    """Where trained rows stand, on one device."""

    indices: Any  # PEFT's list of the tokens
    tokens: Tensor  # int64 [N], the same
    place: Tensor  # int64 [V], which trained row a token has, -1 for none
    at_end: bool  # whether they are the last N tokens in their order


class RowsBeside:
    """What a ``TrainableTokensLayer`` of one active adapter does on a plain table; all else PEFT does."""

    base_layer: Any
    active_adapters: Any
    disable_adapters: bool
    merged: bool
    trainable_tokens_delta: Any
    token_indices: Any

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings of tokens int64 [...], or logits of states [..., D], by the kind of the layer within."""
        if args or kwargs or (name := self._active(active_adapters)) is None:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)  # type: ignore[misc]
        trained, places = self.trainable_tokens_delta[name], self._places(name)
        made = self.base_layer(x)
        if isinstance(self.base_layer, nn.Linear):
            own = linear(x, trained if torch.is_autocast_enabled(x.device.type) else trained.to(x.dtype))
            return made.index_copy_(-1, places.tokens, own.to(made.dtype))  # no backward reads a product's result
        scale = self._get_embed_scale()  # type: ignore[attr-defined]  # Gemma
        return with_trained(made, trained if scale is None else trained * scale.to(trained.dtype), places.place, x)

    def table(self) -> TokenTable | None:
        """Rows by token, where the layer within is an lm_head and its logits are not left to PEFT."""
        name = self._active(self.active_adapters)
        if name is None or not has_rows(self.base_layer):
            return None
        places = self._places(name)
        trained = self.trainable_tokens_delta[name]
        return TokenTable(self.base_layer.weight, None, trained, places.place, places.at_end)

    def _active(self, names: Any) -> str | None:
        """The one adapter whose rows stand beside the table, None where PEFT's own way is to be taken."""
        names = [names] if isinstance(names, str) else list(names or ())
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.trainable_tokens_delta:
            return None
        base = self.base_layer
        if isinstance(base, nn.Linear):
            plain = base.bias is None  # PEFT leaves a bias out
        else:
            plain = (
                isinstance(base, nn.Embedding)
                and base.max_norm is None
                and not (base.sparse or base.scale_grad_by_freq)
                and base.padding_idx not in self.token_indices[names[0]]
            )
        return names[0] if plain and is_whole(base.weight) else None

    def _places(self, name: str) -> _Places:
        trained, indices = self.trainable_tokens_delta[name], self.token_indices[name]
        rows = self.base_layer.weight.shape[0]
        kept: _Places | None = self.__dict__.get("_flr_places")
        if (
            kept is None
            or kept.indices is not indices
            or kept.tokens.device != trained.device
            or len(kept.place) != rows
        ):
            with torch.inference_mode(False):  # a training may follow an evaluation
                index = torch.tensor(indices, device=trained.device)
                place = torch.full((rows,), -1, device=trained.device)
                place[index] = torch.arange(len(indices), device=trained.device)
            at_end = list(indices) == list(range(rows - len(indices), rows))
            kept = self.__dict__["_flr_places"] = _Places(indices, index, place, at_end)
        return kept


@functools.cache
def trained_rows() -> type:
    """PEFT's ``TrainableTokensLayer`` with :class:`RowsBeside`; made when asked for, since PEFT is an extra."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return type("TrainedRows", (RowsBeside, TrainableTokensLayer), {"__module__": __name__})


def rows_alone(model: Any) -> None:
    """Compute the token tables of ``model``, a ``PeftModel``, by rows wherever PEFT trains some of them."""
    ours = trained_rows()
    _, theirs = ours.__bases__
    for module in model.modules():
        if type(module) is theirs:
            module.__class__ = ours
