"""``generate`` of a patched model: prompts without a thought token get theirs, and the caller does not see it."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

from .backbone import attention_types, cache_of
from .base import is_filled
from .insertion import Insertion, remember, thought_tokens

_IDS = ("pad_token_id", "eos_token_id")
_OTHER_MODELS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
_STATIC = ("static", "offloaded_static", "sliding_window")
#: What ``generate`` makes of its options and what looks at tokens; others count columns, and thoughts are some.
_READERS = (
    SequenceBiasLogitsProcessor,  # forbidden words, too
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    StopStringCriteria,
)
_RUNNING: ContextVar[_Generation | None] = ContextVar("flr.generation", default=None)


def flr_generate(
    self: Any, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """``generate`` of a patched model: that of the model it was, with a thought at the end of every prompt.

    Prompts that contain thought tokens are left alone; others get ``config.num_thoughts`` of them, which logits
    processors, stopping criteria, streamers and the returned sequences do not contain. Lengths (``max_length``,
    ``min_length``) count the caller's tokens.

    Args:
        insert_thought: False for a prompt without a thought; default ``config.insert_thought``.

    Raises:
        ValueError: chunked prefill, speculative decoding, guidance without a cache, or a cache that holds a part of the
            prompt already: the reasoner reads the states of the whole prompt in one pass.
    """
    patch = self._flr_patch
    insert = kwargs.pop("insert_thought", None)
    insert = patch.config.insert_thought if insert is None else insert
    names = list(inspect.signature(type(self).generate).parameters)[3:]
    kwargs.update(zip(names, args, strict=False))
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    embeds = kwargs.get("inputs_embeds")
    call = patch.original(self, "generate")
    thinks = patch.config.thought_count > 0
    mask = kwargs.get("attention_mask")
    has = ids is not None and thinks and bool(thought_tokens(patch.config, ids, mask).any())
    prompt = embeds if ids is None or ids.shape[1] == 0 else ids
    if thinks:  # whatever else is suppressed
        others = _setting(self, generation_config, kwargs, "suppress_tokens") or []
        kwargs["suppress_tokens"] = sorted({*others, patch.config.thought_token_id})
    if thinks and not has and not insert:
        kwargs["insert_thought"] = False  # for every forward
    if not thinks or not (has or insert) or prompt is None:
        return call(ids, generation_config, **kwargs)
    _refuse(self, generation_config, kwargs)
    _refuse_window(self, generation_config, kwargs, prompt.shape[1] + (0 if has else patch.config.thought_count))
    if has:
        return call(ids, generation_config, **kwargs)
    _refuse_padding_behind(self, ids, generation_config, kwargs)
    made = _Generation(self, prompt.shape[1], patch.config.thought_count)
    return made.run(call, ids, generation_config, kwargs)


def _setting(model: Any, config: Any, kwargs: dict[str, Any], name: str) -> Any:
    """What ``generate`` will use: its keyword, the config that it was given, or the model's own."""
    for value in (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None)):
        if value is not None:
            return value
    return None


def _refuse(model: Any, config: Any, kwargs: dict[str, Any]) -> None:
    if (size := _setting(model, config, kwargs, "prefill_chunk_size")) is not None:
        raise ValueError(f"prefill_chunk_size: expected None, since a thought needs the whole prompt, got {size}")
    for name in _OTHER_MODELS:
        if (value := _setting(model, config, kwargs, name)) is not None:
            raise ValueError(f"{name}: expected None, since candidates have no thought, got {value!r:.80}")
    guidance = _setting(model, config, kwargs, "guidance_scale")
    if guidance not in (None, 1) and _setting(model, config, kwargs, "use_cache") is False:
        wanted = "1 without a cache, where the thought of the other prompt would move behind the answer"
        raise ValueError(f"guidance_scale: expected {wanted}, got {guidance}")
    past = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
    if is_filled(past):
        raise ValueError(
            "past_key_values: expected an empty cache, since a thought needs the states of the whole prompt, got one "
            "that holds tokens; pass the prompt alone"
        )


def _refuse_window(model: Any, config: Any, kwargs: dict[str, Any], length: int) -> None:
    """Raise where a static cache has dropped a part of the prompt, or its masks have, before a thought is made."""
    text, name = model.config.get_text_config(decoder=True), _setting(model, config, kwargs, "cache_implementation")
    static = isinstance(kwargs.get("past_key_values"), StaticCache) or name in _STATIC
    static = static and _setting(model, config, kwargs, "use_cache") is not False
    if static and attention_types(text) != {"full_attention"} and length > (window := text.sliding_window or length):
        raise ValueError(
            f"cache_implementation: expected a dynamic cache (the default) for a prompt and its thoughts of {length} "
            f"tokens, more than the sliding window's {window}, got {name or 'a static one'}"
        )


def _refuse_padding_behind(model: Any, ids: Tensor | None, config: Any, kwargs: dict[str, Any]) -> None:
    """Raise where rows end in padding, behind which a thought would stand; without a mask as ``generate`` infers it."""
    mask, pad, end = kwargs.get("attention_mask"), *(_setting(model, config, kwargs, name) for name in _IDS)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        is_padding = mask[:, -1] == 0
    elif mask is None and ids is not None and ids.shape[1] and pad is not None:
        ends = end if isinstance(end, list | tuple) else [end]
        is_padding = (ids[:, -1] == pad) & (pad not in ends)
    else:
        return
    if bool(is_padding.any()):
        row = int(is_padding.int().argmax())
        raise ValueError(
            'attention_mask: expected padding on the left in generate (tokenizer.padding_side = "left"), got it on '
            f"the right of row {row}"
        )


def flr_logits_processor(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``generate`` makes of its options: what reads tokens is not shown the thoughts of the call that runs."""
    return _without_thoughts(self, self._flr_patch.original(self, "_get_logits_processor")(*args, **kwargs))


def flr_init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse ``generate_batch`` and its kin, whose rows are of several prompts and never whole.

    Raises:
        ValueError: the model has a thought.
    """
    if self._flr_patch.config.thought_count:
        raise ValueError(
            "generate_batch: expected generate for a model with a thought, which reads a whole prompt at a time, "
            "got continuous batching; flr.Recommender and flr serve answer many at a time"
        )
    return self._flr_patch.original(self, "init_continuous_batching")(*args, **kwargs)


def flr_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As :func:`flr_logits_processor`, for criteria."""
    return _without_thoughts(self, self._flr_patch.original(self, "_get_stopping_criteria")(*args, **kwargs))


def _without_thoughts(model: Any, made: Any) -> Any:
    running = _RUNNING.get()
    if running is None or running.model is not model:
        return made
    hides = _Criterion if isinstance(made, StoppingCriteriaList) else _Processor
    return type(made)(hides(running, one) if isinstance(one, _READERS) else one for one in made)


class _Generation:
    """One call: ``count`` thoughts in the columns from ``start`` on, hidden from whoever looks at the tokens."""

    def __init__(self, model: Any, start: int, count: int) -> None:
        self.model, self.start, self.count = model, start, count

    def without(self, ids: Tensor) -> Tensor:
        """Tokens [..., L] without the thoughts."""
        return torch.cat([ids[..., : self.start], ids[..., self.start + self.count :]], -1)

    def run(self, call: Any, ids: Tensor | None, config: Any, kwargs: dict[str, Any]) -> Any:
        embeds, model = kwargs.get("inputs_embeds"), self.model
        token = model._flr_patch.config.thought_token_id
        shows_prompt = ids is not None and ids.shape[1] > 0
        if embeds is not None:
            if _setting(model, config, kwargs, "use_cache") is False:
                if model._flr_patch.config.mixes:
                    raise ValueError("inputs_embeds: expected input_ids with aggregation mixture, got embeddings")
                raise ValueError("use_cache: expected True with inputs_embeds and an inserted thought, got False")
            column = torch.full((len(embeds), self.count), token, device=embeds.device)
            kwargs["inputs_embeds"] = torch.cat([embeds, model.get_input_embeddings()(column).to(embeds.dtype)], 1)
            kwargs["thought_start"] = self.start
        if ids is not None and shows_prompt:
            ids = torch.nn.functional.pad(ids, (0, self.count), value=token)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = torch.nn.functional.pad(kwargs["attention_mask"], (0, self.count), value=1)
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: expected None, since a thought is inserted, got a tensor")
        self._lengths(config, kwargs)
        if shows_prompt:
            self._observers(kwargs)
        running = _RUNNING.set(self if shows_prompt else None)
        try:
            out = call(ids, config, **kwargs)
        finally:
            _RUNNING.reset(running)
        if isinstance(out, Tensor):
            return self.without(out) if shows_prompt else out
        if shows_prompt:
            out.sequences = self.without(out.sequences)
        if cache_of(out) is not None:
            rows = len(out.sequences)
            place = torch.full((rows,), self.start, device=out.sequences.device)
            remember(cache_of(out), Insertion(place, self.count, self.start))
        return out

    def _lengths(self, config: Any, kwargs: dict[str, Any]) -> None:
        """Lengths of prompt and answer together grow by the thoughts; numbers of new tokens do not."""
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = _setting(self.model, config, kwargs, total)
            if length and _setting(self.model, config, kwargs, new) is None:
                kwargs[total] = length + self.count

    def _observers(self, kwargs: dict[str, Any]) -> None:
        """Wrap what the caller has shown the tokens."""
        for name, many, one in (
            ("logits_processor", LogitsProcessorList, _Processor),
            ("stopping_criteria", StoppingCriteriaList, _Criterion),
        ):
            if kwargs.get(name):
                kwargs[name] = many(one(self, observer) for observer in kwargs[name])
        if (streamer := kwargs.get("streamer")) is not None:
            kwargs["streamer"] = _Streamer(self, streamer)


class _Processor(LogitsProcessor):
    def __init__(self, generation: _Generation, inner: Any) -> None:
        self.generation, self.inner = generation, inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(self.generation.without(input_ids), scores)


class _Criterion(StoppingCriteria):
    def __init__(self, generation: _Generation, inner: Any) -> None:
        self.generation, self.inner = generation, inner
        if hasattr(inner, "max_length"):  # generate reads it
            self.max_length = inner.max_length + generation.count

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.inner(self.generation.without(input_ids), scores, **kwargs)


class _Streamer:
    """Passes on what ``generate`` puts; the first is the prompt."""

    def __init__(self, generation: _Generation, inner: Any) -> None:
        self.generation, self.inner, self.prompt = generation, inner, True

    def put(self, value: Tensor) -> None:
        self.inner.put(self.generation.without(value) if self.prompt else value)
        self.prompt = False

    def end(self) -> None:
        self.inner.end()
