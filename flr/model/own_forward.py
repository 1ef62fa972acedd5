"""The model's own forward on states that are known already: what it makes of them, and what it adds to its loss.

A family may do anything between its base model and its result: transform states, scale and cap logits, balance its
experts. Instead of a list of what each does, its forward runs with a base model that returns the given states.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .base import base_of

_LOCK = threading.RLock()


@dataclass
class _States(ModelOutput):
    """A base model's output; whatever else is looked for in it is None."""

    last_hidden_state: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance's own inside, what was there before afterwards."""
    had, before = name in owner.__dict__, owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            owner.__dict__[name] = before
        else:
            del owner.__dict__[name]


def original_forward(model: Any) -> Any:
    """The forward that a model was patched over, or its own."""
    patch = model.__dict__.get("_flr_patch")
    return model.forward if patch is None else patch.original(model)


def _own_forward(model: Any, states: _States, **arguments: Any) -> Any:
    """The result of the forward that the model was patched over, its base model giving ``states`` to this thread."""
    forward = original_forward(model)
    base, thread = base_of(model), threading.get_ident()
    real = base.forward

    def given(*args: Any, **kwargs: Any) -> Any:
        return states if threading.get_ident() == thread else real(*args, **kwargs)

    with _LOCK, _replaced(base, "forward", given):
        return forward(inputs_embeds=states.last_hidden_state, use_cache=False, return_dict=True, **arguments)


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D], by the model's own forward."""
    rows = hidden if hidden.dim() == 3 else hidden.reshape(1, -1, hidden.shape[-1])
    logits = _own_forward(model, _States(rows)).logits
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def wants_router_loss(model: Any, asked: bool | None) -> bool:
    """Whether the model adds its routers' auxiliary loss to its loss: asked for in a call, or in its configuration.

    Raises:
        ValueError: its loss has a term that takes all logits, which are not made here.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "z_loss_coefficient", 0):  # Bamba
        got = config.z_loss_coefficient
        raise ValueError(f"z_loss_coefficient: expected 0 in a batch with thoughts or labels, got {got}")
    return bool(getattr(config, "output_router_logits", False) if asked is None else asked)


def router_loss(
    model: Any, hidden: Tensor, router_logits: tuple[Tensor, ...], mask: Any
) -> tuple[Tensor, Tensor | None]:
    """What routing adds to the model's loss, and the auxiliary loss before it is weighted.

    Args:
        model: mixture of experts.
        hidden: [B, L, D]; of these only the shape of two columns matters.
        router_logits: of every layer with experts, those of all tokens [B·L, E].
        mask: int64 [B, L], or None: the tokens that count, as the model's forward would be given it.
    """
    zero = hidden.new_zeros((), dtype=torch.float32)
    few = hidden[:, :2].detach()
    states = _States(few, router_logits)
    labels = torch.zeros(few.shape[:2], dtype=torch.int64, device=hidden.device)
    with _replaced(model, "_loss_function", lambda *args, **kwargs: zero.clone()):
        out = _own_forward(model, states, attention_mask=mask, labels=labels, output_router_logits=True)
    return out.loss, getattr(out, "aux_loss", None)
