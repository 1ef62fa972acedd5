"""Rows behind a prompt that they share: how a model of transformers is made to attend by :mod:`.merged_attention`.

    prompt's cache ──> SharedLayer: the prompt's keys and values, and apart from them those of the rows
    model(rows) ──> update() of a layer gives the rows' own ──> the attention's entry joins both parts' results

The model is given a mask of one number, which stands for "there is one" and is looked at by nobody. Whether all of that
comes to the states of one pass is tried, once for a model and its attention. What a call asks for beyond it (dropout,
biases by position, caps, sinks) is computed with a mask over all columns.

Models of flash_attention_2 attend by PyTorch's own kernels here. flash-attn was not at hand: a stand-in is in the
tests, and nothing of this has run on a device.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_entry import entered
from .backbone import attention_types, causal_lm, evaluating, may_look, takes_positions
from .base import run_base
from .merged_attention import apart, merged_attention, prompt_bias, together
from .verify import FAULTS, difference, tolerance, traits_of

#: Attentions whose models are made to attend so. The second takes no mask of rows by columns: it has no other way.
ATTENTIONS = ("sdpa", "flash_attention_2")
_WANTED = contextvars.ContextVar[bool | None]("flr.shared_prompts", default=None)
#: Options of an attention that change its result, and what they are when they do not.
_PLAIN: dict[str, Any] = {"dropout": 0.0, "position_bias": None, "softcap": None, "s_aux": None, "cache": None}
_known: weakref.WeakKeyDictionary[Any, dict[str, bool]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def shared_prompts(wanted: bool) -> Iterator[None]:
    """Inside, take this way wherever it serves, or nowhere; else it is taken where it was measured to be faster.

    That is for members on a CPU (docs/log.md), and where there is no other way.
    """
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def attention_of(model: Any) -> str:
    """The name of a model's attention; "" where its config gives none."""
    return getattr(causal_lm(model).config.get_text_config(decoder=True), "_attn_implementation", None) or ""


def shares(model: Any, preferred: bool, longest: int | None = None) -> bool:
    """Whether rows of a model attend to the prompt and to their own tokens in two calls.

    Args:
        preferred: whether that is the choice where a mask of rows by all columns does, too.
        longest: tokens of a prompt and of what follows it; None where the caller sees to windows.
    """
    wanted, name = _WANTED.get(), attention_of(model)
    if wanted is None:
        wanted = preferred or name != "sdpa"
    if not wanted or name not in ATTENTIONS or not takes_positions(model):
        return False
    config = causal_lm(model).config.get_text_config(decoder=True)
    types, window = attention_types(config), getattr(config, "sliding_window", None)
    if types - {"full_attention", "sliding_attention"} or getattr(config, "alibi", False):
        return False
    if longest is not None and "sliding_attention" in types and window is not None and longest > window:
        return False
    return traits_of(model).plain_cache and tried(model, name)


class Shared(NamedTuple):
    """What the attention of a layer is given beside queries and own keys and values, as option ``flr_shared``."""

    keys: Tensor | None  # [B, H_kv, L, d] of the prompt; None where they are the first L of those that come
    values: Tensor | None
    bias: Tensor | None  # [B, 1, 1, L]
    own_mask: Tensor | None  # [1 or B·G, 1, n, c]
    members: int
    length: int  # L


class SharedLayer(DynamicLayer):
    """Keys and values of B prompts, and apart from them those of G members a prompt.

    ``update`` takes them as [B, H, G·n, d] and gives all of the members' own as [B·G, H, c, d].
    """

    def __init__(self, keys: Tensor, values: Tensor, members: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.members = keys, values, members
        self.own: tuple[Tensor, Tensor] | None = None
        self.runs: list[int] = []  # tokens of a member that came at a time

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = apart(key_states, self.members), apart(value_states, self.members)
        if self.own is not None:
            keys, values = torch.cat([self.own[0], keys], 2), torch.cat([self.own[1], values], 2)
        return self.take(keys, values)

    def take(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B·G, H, c, d] with new ones behind those that were there."""
        self.runs.append(keys.shape[2] - sum(self.runs))
        self.own = (keys, values)
        return self.own

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] + self.members * sum(self.runs)  # type: ignore[union-attr]

    def joined(self) -> tuple[Tensor, Tensor]:
        """All keys and all values [B, H, L + c, d], in the order in which they came: run by run, member by member."""
        prompt, own = (self.keys, self.values), self.own or (None, None)
        keys, values = (self._joined(a, b) for a, b in zip(prompt, own, strict=True))  # type: ignore[arg-type]
        return keys, values

    def _joined(self, prompt: Tensor, own: Tensor | None) -> Tensor:
        runs = () if own is None else own.split(self.runs, 2)
        return torch.cat([prompt, *(together(run, self.members) for run in runs)], 2)


@dataclass
class SharedRows:
    """The attention of rows that share prompts, for a thread."""

    bias: Tensor | None
    own_mask: Tensor | None
    members: int
    length: int
    layers: list[SharedLayer] | None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        shared = self.of(None if self.layers is None else self.layers[module.layer_idx])
        return shared_attention(module, query, key, value, mask, flr_shared=shared, **options)

    def of(self, layer: SharedLayer | None) -> Shared:
        """What one layer's attention is given."""
        prompt = (None, None) if layer is None else (layer.keys, layer.values)
        return Shared(*prompt, self.bias, self.own_mask, self.members, self.length)


def shared_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, flr_shared: Shared, **options: Any
) -> tuple[Tensor, None]:
    """Attention of queries [B, H, G·n, d] to their prompts and to own keys and values; [B, G·n, H, d]."""
    prompt_key, prompt_value, bias, own_mask, members, length = flr_shared
    if prompt_key is None or prompt_value is None:
        prompt_key, key = key[:, :, :length], key[:, :, length:]
        prompt_value, value = value[:, :, :length], value[:, :, length:]
    prompt, own = (prompt_key, prompt_value), (key, value)
    plain = all(options.get(name, usual) in (usual, None) for name, usual in _PLAIN.items())
    if not plain or options.get("output_attentions") or query.shape[-1] != value.shape[-1]:
        return _masked(module, query, prompt, own, flr_shared, options), None
    out = merged_attention(query, prompt, own, bias, own_mask, members, options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


def _masked(
    module: Any,
    query: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    shared: Shared,
    options: dict[str, Any],
) -> Tensor:
    """The same by transformers' sdpa attention, under a mask over all columns."""
    members, count, columns = shared.members, query.shape[2] // shared.members, own[0].shape[2]
    keys, values = (torch.cat([a, together(b, members)], 2) for a, b in zip(prompt, own, strict=True))
    own_mask, batch = shared.own_mask, len(query)
    if own_mask is None:
        later = torch.ones(count, columns, dtype=torch.bool, device=query.device).triu(1)
        own_mask = torch.zeros(1, 1, count, columns, device=query.device).masked_fill(later, -torch.inf)
    same = torch.eye(members, dtype=torch.bool, device=query.device)[:, None, :, None]
    seen = own_mask.expand(batch * members, 1, count, columns).reshape(batch, members, count, 1, columns)
    seen = torch.where(same, seen, -torch.inf).flatten(3)  # [B, G, n, G·c]
    before = seen.new_zeros(1, 1, 1, 1) if shared.bias is None else shared.bias
    mask = torch.cat([before.expand(batch, members, count, shared.length), seen], -1).flatten(1, 2)[:, None]
    return sdpa_attention_forward(module, query, keys, values, mask.to(query.dtype), **options)[0]


class MemberRows:
    """G members a prompt as rows of one, with a cache of :class:`SharedLayer`.

    Args:
        cache: of the prompts alone; it is left as it is.
        mask: [B, L], not 0 on the prompts' tokens.
    """

    def __init__(self, model: Any, cache: Cache, mask: Tensor, members: int) -> None:
        layers: list[Any] = list(cache.layers)
        self.name, self.members, self.length = attention_of(model), members, mask.shape[1]
        self.layers = [SharedLayer(layer.keys, layer.values, members) for layer in layers]
        self.cache = Cache(layers=[*self.layers])
        self.bias = bias_of(mask, layers[0].keys.dtype)
        self.placeholder = mask.new_ones(1, 1, 1, 1, dtype=torch.bool)  # as attention_mask

    @contextlib.contextmanager
    def attending(self, count: int) -> Iterator[None]:
        """For a forward of ``count`` tokens a member."""
        own = self.layers[0].own
        before, own_mask = 0 if own is None else own[0].shape[2], None
        if before:
            seen = torch.ones(count, before + count, dtype=torch.bool, device=self.placeholder.device).tril(before)
            own_mask = additive(seen[None], self.layers[0].dtype)
        with entered(self.name, SharedRows(self.bias, own_mask, self.members, self.length, self.layers)):
            yield

    def joined(self) -> DynamicCache:
        """A cache of prompts and members, the members' columns in the order in which they came."""
        plain = DynamicCache()
        for number, layer in enumerate(self.layers):
            plain.update(*layer.joined(), number)
        return plain


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """:func:`.merged_attention.prompt_bias` of prompts; None where a look costs nothing and shows no padding."""
    return None if may_look(mask) and bool(mask.all()) else prompt_bias(mask, dtype)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [R, n, c] as what is added to scores, [R, 1, n, c]: 0, or -inf where not ``seen``."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


@contextlib.contextmanager
def hypotheses_attend(model: Any, prompt: Tensor, sees: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """For a forward whose cache gives the prompt's L columns and the hypotheses' behind them; gives the mask to pass.

    Args:
        prompt: [B, L], not 0 on the prompts' tokens. sees: bool [B, n, c], what tokens see of the columns behind.
        dtype: of the cache.
    """
    rows = SharedRows(bias_of(prompt, dtype), additive(sees, dtype), 1, prompt.shape[1], None)
    with entered(attention_of(model), rows):
        yield prompt.new_ones(1, 1, 1, 1, dtype=torch.bool)


def tried(model: Any, name: str) -> bool:
    """Whether two members behind a prompt have the states that each has alone, in one pass; found out once."""
    lm = causal_lm(model)
    known = _known.setdefault(lm, {})
    if name not in known:
        known[name] = _holds(lm)
    return known[name]


def _holds(lm: Any) -> bool:
    table = lm.get_input_embeddings()
    usual = torch.arange(1, 7, device=table.weight.device) * 7919 % len(table.weight)
    ids = torch.stack([usual, torch.cat([usual[:3], usual[3:].flip(0)])])  # a prompt of 3, and 3 of each member
    positions = torch.arange(6, device=ids.device)

    def run(tokens: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        out, cache = run_base(lm, table(tokens), None if traits_of(lm).embeds else tokens, **arguments)
        return out.last_hidden_state, cache

    with torch.no_grad(), evaluating(lm):
        try:
            expected, prompt = run(ids)[0][:, 3:], ids[:1, :3]
            _, cache = run(prompt, cache=DynamicCache(), use_cache=True)
            rows, states = MemberRows(lm, cache, torch.ones_like(prompt), 2), []
            for part in (slice(3, 4), slice(4, 6)):
                tokens, places = ids[:, part].reshape(1, -1), positions[part].repeat(2)[None]
                with rows.attending(tokens.shape[1] // 2):
                    arguments = {"attention_mask": rows.placeholder, "position_ids": places}
                    found, _ = run(tokens, cache=rows.cache, use_cache=True, **arguments)
                states.append(found[0].unflatten(0, (2, -1)))
            return difference(torch.cat(states, 1), expected) <= tolerance(expected.dtype)
        except (*FAULTS, ImportError):
            return False
