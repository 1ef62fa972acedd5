"""The thought's row in the embeddings, and its token in a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flr.config import FLRConfig

from .backbone import is_patched

#: Tokens of a model's settings whose ids nothing else may have.
_SPECIAL = ("pad_token_id", "eos_token_id", "bos_token_id")


def thought_id(model: Any, config: FLRConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The thought token's id: the tokenizer's, the next one it will give, the config's, or the first after the table.

    Raises:
        ValueError: the config and the tokenizer disagree.
    """
    if tokenizer is None:
        return rows(model) if config.thought_token_id is None else config.thought_token_id
    known = tokenizer.get_vocab().get(config.thought_token)
    token_id = len(tokenizer) if known is None else known
    if config.thought_token_id not in (None, token_id):
        raise ValueError(
            f"thought_token_id: expected {token_id}, the tokenizer's id of {config.thought_token!r}, "
            f"got {config.thought_token_id}"
        )
    return token_id


def teach(tokenizer: PreTrainedTokenizerBase, config: FLRConfig) -> None:
    """Add the thought token to ``tokenizer``, if it lacks it, with the id that :func:`thought_id` said."""
    if config.thought_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([config.thought_token], special_tokens=True)
    got = tokenizer.get_vocab()[config.thought_token]
    if got != config.thought_token_id:
        raise ValueError(
            f"tokenizer: expected to give {config.thought_token!r} the id {config.thought_token_id}, got {got}"
        )


def rows(model: Any) -> int:
    """Rows of the input embeddings."""
    return model.get_input_embeddings().weight.shape[0]


def grow(model: Any, needed: int) -> int | None:
    """Give the embeddings ``needed`` rows, new ones the mean of the old; the number before, None if it was enough."""
    old = rows(model)
    if needed <= old:
        return None
    model.resize_token_embeddings(needed, mean_resizing=False)
    _fill_new_rows(model, old)
    return old


@torch.no_grad()
def _fill_new_rows(model: Any, old_size: int) -> None:
    for module in _tables(model):
        weight = module.weight
        if weight.device.type != "meta" and weight.shape[0] > old_size:
            weight[old_size:] = weight[:old_size].float().mean(0).to(weight.dtype)


def _tables(model: Any) -> list[Any]:
    """Input and output embeddings, once each."""
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(module): module for module in pair if module is not None}.values())


class Tables:
    """The embeddings as they are, to put them back if a patch fails half-way."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.saved = [(module, dict(vars(module)), dict(module._parameters)) for module in _tables(model)]
        self.data = {
            id(p): (p, p.data) for _, _, parameters in self.saved for p in parameters.values() if p is not None
        }
        self.pair = (model.get_input_embeddings(), model.get_output_embeddings())
        self.own = {name: vars(model)[name] for name in ("vocab_size",) if name in vars(model)}
        self.sizes = [(config, config.vocab_size) for config in self._configs() if hasattr(config, "vocab_size")]

    def _configs(self) -> list[Any]:
        configs = (self.model.config, self.model.config.get_text_config())
        return list({id(config): config for config in configs}.values())

    def restore(self) -> None:
        """Modules, weights and sizes as they were."""
        for parameter, data in self.data.values():
            parameter.data = data
        for module, attributes, parameters in self.saved:
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
        self.model.set_input_embeddings(self.pair[0])
        self.model.set_output_embeddings(self.pair[1])
        for config, size in self.sizes:
            config.vocab_size = size
        if "vocab_size" not in self.own:
            self.model.__dict__.pop("vocab_size", None)
        self.model.__dict__.update(self.own)


def refuse_shared_id(model: Any) -> None:
    """Raise where another special token of the model has the thought's id: rows that contain it would look as if they
    brought thoughts of their own."""
    own = model._flr_patch.config.thought_token_id
    for settings in (model.config.get_text_config(decoder=True), model.generation_config):
        for name in _SPECIAL:
            value = getattr(settings, name, None)
            if own is not None and (value == own or (isinstance(value, list) and own in value)):
                raise ValueError(
                    f"{name}: expected another id than the thought's, {own}, got the same; add tokens before "
                    "flr.patch_model, or give it the tokenizer"
                )


def renumber(model: Any, token_id: int) -> None:
    """Say everywhere that the thought token of a patched model has another id."""
    config: FLRConfig = model._flr_patch.config
    old, config.thought_token_id = config.thought_token_id, token_id
    model.config.flr = config.to_dict()
    generation = model.generation_config
    if generation is not None and generation.suppress_tokens is not None:
        generation.suppress_tokens = [token_id if token == old else token for token in generation.suppress_tokens]


@torch.no_grad()
def flr_resize_token_embeddings(
    self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """``resize_token_embeddings`` of a patched model: that of the model it was, and the thought keeps a row.

    A thought whose id no tokenizer knows stands behind the tokens, whose number is ``new_num_tokens``, so the table
    gets a row more. One that a tokenizer knows keeps its id.

    Raises:
        ValueError: fewer rows than a thought with a fixed id needs.
    """
    patch = self._flr_patch
    token_id, resize = patch.config.thought_token_id, patch.original(self, "resize_token_embeddings")
    if token_id is None or new_num_tokens is None:
        found = resize(new_num_tokens, pad_to_multiple_of, mean_resizing)
        patch.vocab_size = patch.vocab_size if pad_to_multiple_of is None else None
        return found
    if patch.is_named and new_num_tokens <= token_id:
        raise ValueError(
            f"new_num_tokens: expected at least {token_id + 1}, since the thought of this model has the id {token_id}, "
            f"got {new_num_tokens}"
        )
    if patch.is_named:
        patch.vocab_size = None  # the rows are the caller's
        return resize(new_num_tokens, pad_to_multiple_of, mean_resizing)
    thoughts = [module.weight[token_id].clone() for module in _tables(self)]
    found = resize(new_num_tokens + 1, pad_to_multiple_of, mean_resizing)
    for module, thought in zip(_tables(self), thoughts, strict=True):
        module.weight[new_num_tokens] = thought
    renumber(self, new_num_tokens)
    patch.vocab_size = new_num_tokens if rows(self) == new_num_tokens + 1 else None
    return found


@torch.no_grad()
def add_thought_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Teach ``tokenizer`` the thought token of a model that was patched without one.

    The token gets the tokenizer's next id; where the model's table is longer than the tokenizer (a padded vocabulary),
    the thought's embedding moves to that row and the model's config follows.

    Args:
        model: patched; changed in place where the id differs.
        tokenizer: extended in place.

    Returns:
        The token's id.

    Raises:
        ValueError: the model is not patched or has no thought, or the tokenizer does not fit the model's table.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flr.data import Catalogue, build_tokenizer
        >>> from flr.model.patch import patch_model
        >>> tokenizer = build_tokenizer(Catalogue(["x", "y"], ["Blue", "Green"]), "id")
        >>> tiny = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                    num_attention_heads=4, num_key_value_heads=2)
        >>> model = patch_model(LlamaForCausalLM(tiny), thought_token="<|think|>")
        >>> model.config.flr["thought_token_id"], add_thought_token(model, tokenizer) == len(tokenizer) - 1
        (100, True)
    """
    if not is_patched(model) or model._flr_patch.config.thought_count == 0:
        raise ValueError("model: expected a patched model with a thought, got one without")
    config: FLRConfig = model._flr_patch.config
    old = config.thought_token_id
    assert old is not None
    known = tokenizer.get_vocab().get(config.thought_token)
    new = len(tokenizer) if known is None else known
    if new > old:
        raise ValueError(
            f"tokenizer: expected at most {old} tokens, since the thought of this model has the id {old}, got {new}"
        )
    if new != old:
        for module in _tables(model):
            module.weight[new] = module.weight[old]
        renumber(model, new)
    teach(tokenizer, config)
    model._flr_patch.is_named = True
    return new


def embedding_of(model: Any, token_id: int, device: torch.device) -> Tensor:
    """The input embedding [D] of a token, with a gradient to its row."""
    return model.get_input_embeddings()(torch.full((1, 1), token_id, device=device))[0, 0]
