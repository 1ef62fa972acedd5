"""What a causal LM can do, found out by running a few tokens through it once.

A family's forward says little about what holds: caches of recurrent layers forget that several tokens may follow a
prompt, masks are ignored, embeddings are not all that is read of a token. Each of these would make a latent thought
silently wrong, so each is tried: against one pass over the whole sequence, which defines what is right.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone import (
    attention_types,
    causal_lm,
    evaluating,
    forward_parameters,
    packing_obstacle,
    takes_positions,
    warn_once,
)
from .base import base_of, base_parameters, masks_by_type, run_base
from .head import scaled_head
from .own_forward import own_logits

#: Tokens of the probe; its prompt; the first piece of it. A single token makes up the third, as a thought does.
LENGTH, CUT, FIRST = 16, 11, 6
#: What a forward raises that was not made for what is tried.
FAULTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Traits:
    """What holds for a model beyond that its states are causal and lead to its logits.

    Attributes:
        embeds: all that it reads of a token is its embedding; else it is given the ids as well.
        pieces: several tokens behind a cached prompt have the states of one pass.
        gradients: they have its gradients, too.
        steps: one token behind a cached prompt has the state of one pass.
        left_padding: masked columns before a row change nothing.
        plain_cache: keys and values of all tokens are all that it caches of a prompt.
        packing: a 4-D mask keeps hypotheses in one row apart.
        linear_head: logits are the lm_head's product with the states, scaled as the config says; else the model's own
            forward makes them.
    """

    embeds: bool = True
    pieces: bool = True
    gradients: bool = True
    steps: bool = True
    left_padding: bool = True
    plain_cache: bool = True
    packing: bool = True
    linear_head: bool = True

    def fallbacks(self) -> list[str]:
        """What is done instead where something does not hold, in words."""
        said = {
            "embeds": "token ids go in beside the embeddings",
            "pieces": "the prompt is encoded once more for every thought: its cache takes no several tokens",
            "gradients": "in training the prompt is encoded once more for every thought: its cache passes no gradients",
            "steps": "decoding encodes every sequence anew: its cache does not continue a prompt",
            "left_padding": "rows are not shifted, and decoding takes prompts without padding",
            "plain_cache": "group members are encoded one by one: its cache is more than keys and values",
            "packing": "beams and group members are rows of their own: it takes no 4-D mask",
            "linear_head": "logits come from the model's own forward",
        }
        return [text for name, text in said.items() if not getattr(self, name)]


_KNOWN: weakref.WeakKeyDictionary[Any, Traits] = weakref.WeakKeyDictionary()


def traits_of(model: Any) -> Traits:
    """Traits of a model, patched or not; found out at the first call."""
    lm = causal_lm(model)
    patch = lm.__dict__.get("_flr_patch")
    known = _KNOWN.get(lm) if patch is None else patch.traits
    if known is None:
        known = probe(lm)
        if patch is None:
            _KNOWN[lm] = known
        else:
            patch.traits = known
    return known


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference, relative to the norm of ``theirs``."""
    if ours.shape != theirs.shape:
        return float("inf")
    error, size = (ours.float() - theirs.float()).norm(), theirs.float().norm().clamp_min(1e-12)
    return float(error / size)


def tolerance(dtype: torch.dtype) -> float:
    """What rounding may make of a relative difference between two ways to the same states.

    One that is exceeded by rounding costs time, a slower way; what would refuse a model is given more.
    """
    return 5e-5 if dtype in (torch.float32, torch.float64) else 3e-2


class _Probe:
    """A row of tokens of one model, and what it makes of them in one pass."""

    def __init__(self, lm: Any, avoid: int | None) -> None:
        self.lm, self.table = lm, lm.get_input_embeddings()
        rows = self.table.weight.shape[0]
        special = {avoid, getattr(lm.config.get_text_config(decoder=True), "pad_token_id", None)}
        usual = [n for n in (i * 7919 % rows for i in range(4 * LENGTH)) if n not in special][:LENGTH]
        self.ids = torch.tensor([(usual * LENGTH)[:LENGTH]], device=self.table.weight.device)
        self.by_id = False
        self.whole = torch.empty(0)
        _check_states(self)

    def states(self, ids: Tensor, embeds: Tensor | None = None, cache: Any = None, **arguments: Any) -> Tensor:
        return self.run(ids, embeds, cache, **arguments)[0]

    def run(
        self, ids: Tensor, embeds: Tensor | None = None, cache: Any = None, use_cache: bool = False, **arguments: Any
    ) -> tuple[Tensor, Any]:
        """Last hidden states, and the cache."""
        embeds = self.table(ids) if embeds is None else embeds
        out, cache = run_base(
            self.lm, embeds, ids if self.by_id else None, cache=cache, use_cache=use_cache, **arguments
        )
        return out.last_hidden_state, cache

    def agrees(self, ours: Callable[[], Tensor], theirs: Tensor, factor: float = 1.0, refuses: bool = False) -> bool:
        """Whether ``ours`` works and gives the same states."""
        try:
            limit = max(tolerance(theirs.dtype), 1e-3) if refuses else factor * tolerance(theirs.dtype)
            return difference(ours(), theirs) <= limit
        except FAULTS:
            return False

    def follows(self, states: Tensor, changed: Tensor) -> bool:
        """Whether embeddings give the states of their ids, and others [1, L, D] others from the cut on."""
        if not self.agrees(lambda: self.states(self.ids), states):
            return False
        try:
            moved = self.states(self.ids, changed)[:, CUT:]
        except FAULTS:
            return False
        return difference(moved, states[:, CUT:]) > 1e-6

    def gradient(self, states: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient [1, L, D] in the embeddings of a fixed weighting of the states."""
        with torch.enable_grad():
            embeds = self.table(self.ids).detach().requires_grad_()
            weights = torch.linspace(-1, 1, self.whole.shape[-1], device=embeds.device, dtype=embeds.dtype)
            total = (states(embeds) * weights).sum()
            return torch.autograd.grad(total, embeds)[0].detach()


def probe(lm: Any, avoid: int | None = None) -> Traits:
    """Find out what holds for a causal LM, by some ten forwards of sixteen tokens; no gradient is left behind.

    Args:
        lm: causal LM without wrappers, its weights in memory.
        avoid: a token that shall not be among those that are tried.

    Raises:
        ValueError: its states are not causal, differ from call to call, or do not follow from its tokens' embeddings.
    """
    with torch.no_grad(), evaluating(lm):
        return _traits(_Probe(lm, avoid))


def _traits(found: _Probe) -> Traits:
    free = _padding_is_free(found)
    pieces = found.agrees(lambda: _continued(found), found.whole)
    pieces = pieces and (not free or found.agrees(lambda: _padded(found, _continued), found.whole))
    plain = pieces and found.agrees(lambda: _continued(found, cache=DynamicCache()), found.whole)
    steps = pieces or found.agrees(lambda: _stepped(found), found.whole)
    return Traits(
        embeds=not found.by_id,
        pieces=pieces,
        gradients=pieces and _gradients_agree(found),
        steps=steps and (pieces or not free or found.agrees(lambda: _padded(found, _stepped), found.whole)),
        left_padding=free,
        plain_cache=plain,
        packing=plain and _masks_part(found),
    )


def _name(lm: Any) -> str:
    return type(lm).__name__


def _check_states(found: _Probe) -> None:
    """Refuse what no latent thought can be put into; note whether ids must go in beside the embeddings."""
    lm, ids, name = found.lm, found.ids, _name(found.lm)
    arguments = {"use_cache": False} if "use_cache" in base_parameters(base_of(lm)) else {}

    def plain() -> Tensor:
        return base_of(lm)(input_ids=ids, return_dict=True, **arguments).last_hidden_state

    try:
        states = plain()
    except FAULTS as error:
        raise ValueError(
            f"model: expected states of text alone, got {type(error).__name__} of {name}: {error}"
        ) from error
    if not bool(states.isfinite().all()):
        raise ValueError(f"model: expected finite states, got NaN or infinity of {name}")
    if states.shape[:2] != ids.shape or not found.agrees(plain, states, refuses=True):
        raise ValueError(f"model: expected states that follow from the tokens, got others at every call of {name}")
    size = found.table(ids).shape[-1]
    if states.shape[-1] != size:
        raise ValueError(f"model: expected states as wide as embeddings, got {states.shape[-1]} and {size} of {name}")
    changed = found.table(ids).clone()
    changed[:, CUT] = changed[:, CUT].roll(1, -1)  # of no token, as a thought is
    if not found.follows(states, changed):
        found.by_id = True
        if not found.follows(states, changed):
            raise ValueError(f"model: expected states that follow from the embeddings of its tokens, got {name}")
    found.whole = found.states(ids)
    positions = torch.arange(LENGTH, device=ids.device)[None]
    if takes_positions(lm) and not found.agrees(
        lambda: found.states(ids, position_ids=positions), found.whole, refuses=True
    ):
        raise ValueError(f"model: expected positions that count from 0, as generate gives them, got others of {name}")
    if not found.agrees(lambda: found.states(ids[:, :CUT]), found.whole[:, :CUT], refuses=True):
        hint = "; is_decoder=True in its config makes it one" if hasattr(lm.config, "is_decoder") else ""
        raise ValueError(f"model: expected causal attention, got {name}, where tokens see later ones{hint}")


class _Row(NamedTuple):
    """The probe's tokens, behind masked columns or not."""

    ids: Tensor
    mask: Tensor
    positions: Tensor | None


def _row(found: _Probe, padding: int = 0) -> _Row:
    ids = torch.cat([found.ids[:, :padding], found.ids], 1)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    told = padding > 0 and takes_positions(found.lm)  # where only the base model takes them, nobody gives them
    return _Row(ids, mask, (mask.cumsum(1) - 1).clamp_min(0) if told else None)


def _parts(found: _Probe, row: _Row, cuts: list[int], embeds: Tensor | None = None, cache: Any = None) -> Tensor:
    """States of a row in pieces between ``cuts``, each going on in the cache of the ones before."""
    states = []
    for start, stop in itertools.pairwise(cuts):
        part = None if embeds is None else embeds[:, start:stop]
        positions = None if row.positions is None else row.positions[:, start:stop]
        arguments = {"attention_mask": row.mask[:, :stop], "position_ids": positions}
        state, cache = found.run(row.ids[:, start:stop], part, cache, use_cache=True, **arguments)
        if cache is None:
            raise ValueError("no cache")
        states.append(state)
    return torch.cat(states, 1)


def _continued(found: _Probe, embeds: Tensor | None = None, cache: Any = None, padding: int = 0) -> Tensor:
    """States of all tokens in four pieces: a cache that is overwritten shows it in the gradients of the third."""
    cuts = [0, *(padding + cut for cut in (FIRST, CUT - 1, CUT, LENGTH))]
    return _parts(found, _row(found, padding), cuts, embeds, cache)[:, padding:]


def _stepped(found: _Probe, padding: int = 0) -> Tensor:
    """States of all tokens, those behind the prompt one at a time."""
    cuts = [0, *(padding + cut for cut in range(CUT, LENGTH + 1))]
    return _parts(found, _row(found, padding), cuts)[:, padding:]


def _padded(found: _Probe, way: Callable[..., Tensor]) -> Tensor:
    return way(found, padding=LENGTH - CUT)


def _gradients_agree(found: _Probe) -> bool:
    try:
        expected = found.gradient(lambda embeds: found.states(found.ids, embeds))
    except FAULTS:  # a quantised model may know no gradient at all
        return False
    return found.agrees(lambda: found.gradient(lambda embeds: _continued(found, embeds)), expected, factor=10)


def _padding_is_free(found: _Probe) -> bool:
    """Whether states are the same behind masked columns, in one pass."""
    padding = LENGTH - CUT
    row = _row(found, padding)
    arguments = {"attention_mask": row.mask, "position_ids": row.positions}
    return found.agrees(lambda: found.states(row.ids, **arguments)[:, padding:], found.whole)


def _masks_part(found: _Probe) -> bool:
    """Whether two tokens behind a prompt, each hidden from the other by a 4-D mask, are as if each were alone."""
    config = found.lm.config.get_text_config(decoder=True)
    if packing_obstacle(found.lm) is not None or attention_types(config) - {"full_attention", "sliding_attention"}:
        return False
    ids = found.ids
    alone = torch.cat([ids[:, :CUT], ids[:, CUT + 1 : CUT + 2]], 1)
    expected = torch.cat([found.whole[:, CUT : CUT + 1], found.states(alone)[:, CUT:]], 1)
    position = torch.tensor([*range(CUT), CUT, CUT], device=ids.device)
    seen = torch.ones(1, 2, CUT + 2, dtype=torch.bool, device=ids.device)
    seen[:, 0, CUT + 1] = seen[:, 1, CUT] = False
    mask = masks_by_type(config, seen, position, found.whole.dtype)

    def packed() -> Tensor:
        _, cache = found.run(ids[:, :CUT], None, DynamicCache(), use_cache=True)
        positions = torch.full((1, 2), CUT, device=ids.device)
        arguments = {"attention_mask": mask, "position_ids": positions}
        return found.run(ids[:, CUT : CUT + 2], None, cache, use_cache=True, **arguments)[0]

    return found.agrees(packed, expected)


def find_traits(model: Any, patch: Any, scale: bool) -> None:
    """Find the traits of a model that is being patched, and say what is done where one does not hold.

    Args:
        model: patched so far that ``flr`` and ``_flr_patch`` are there.
        patch: takes the traits.
        scale: whether to size the thought to ``config.init_scale`` of the input embeddings, which are measured.

    Raises:
        ValueError: as :func:`probe`, or its logits do not follow from its states.
    """
    config, table = patch.config, model.get_input_embeddings()
    with torch.no_grad(), evaluating(model):
        patch.traits = None
        found = _Probe(model, config.thought_token_id)
        traits = _traits(found)
        patch.traits = dataclasses.replace(traits, linear_head=_head_is_linear(model, patch, found))
        if scale and config.input_scale is None:
            sample = table(torch.arange(min(len(table.weight), 4096), device=found.ids.device)).float()
            config.input_scale = float(sample.square().mean().sqrt()) or 1.0
            if config.has_reasoner:
                model.flr.take_unit()
        if scale and config.variant in ("flr", "offsets"):
            thought = model.flr(found.whole).thought.float()
            size = max(float(thought.square().mean().sqrt()), 1e-12)
            model.flr.rescale(config.init_scale * config.input_scale / size)
    for text in patch.traits.fallbacks():
        warn_once(f"{_name(model)}: {text}")


def _head_is_linear(model: Any, patch: Any, found: _Probe) -> bool:
    """Whether the lm_head reads the states, and its scaled product gives the logits.

    Raises:
        ValueError: not even the model's own forward gives its logits when it is given the states.
    """
    arguments = {"use_cache": False} if "use_cache" in forward_parameters(type(model).forward) else {}
    read: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        theirs = patch.original(model)(input_ids=found.ids, return_dict=True, **arguments).logits
    finally:
        handle.remove()
    share = max(tolerance(theirs.dtype) / 3, 3e-4)
    try:
        error: Any = difference(own_logits(model, found.whole), theirs)
    except FAULTS as fault:
        error = fault
    if not isinstance(error, float) or not error <= share:
        got = f"a relative difference of {error:.2g}" if isinstance(error, float) else error
        raise ValueError(
            f"model: expected lm_head(base_model(x)) to give the logits of {_name(model)}, got {got}; "
            "this architecture is not supported"
        )
    share = min(share, tolerance(theirs.dtype))
    reads_states = len(read) == 1 and difference(read[0], found.whole) <= share
    return reads_states and difference(scaled_head(model, found.whole), theirs) <= share
