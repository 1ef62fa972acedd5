"""The forward of a patched causal LM: the prompt is encoded once, the thought is made, only the rest follows.

Attention is causal, so neither the prompt's hidden states nor its keys and values depend on the thought. The input is
cut at the thought columns c_1 < c_2 < … and the base model runs over each piece once, on one KV cache:

    [0, c_1) ──> H ──> reasoner ──> embedding at c_1;   [c_1, c_2) ──> more of H ──> …;   [c_n, L)

Rows whose thoughts stand in different columns are shifted (whole rows, so that distances between tokens stay) until
the first thoughts share a column. The lm_head runs only on rows that have a label, or that the caller asked for.
Where no KV cache can be used (gradient checkpointing) every piece starts from column 0 again: the two-pass way.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from flr.config import FLRConfig

from .reasoner import LOSSES, ReasonerOutput

if TYPE_CHECKING:
    from .catalogue_loss import CatalogueLoss
    from .group_forward import GroupInputs

logger = logging.getLogger("flr")

IGNORE = -100
#: Logits kept for the backward of the loss; above it, they are recomputed a block of rows at a time.
MAX_LOSS_LOGITS = 1 << 26


@dataclass
class FLROutput:
    """The thoughts of one forward: one :class:`ReasonerOutput` a thought column, in order.

    ``thought``, ``attention`` [B, T, K, L], ``gates`` [B, T, K] and ``contributions`` [B, K, D] are those of the last
    one; ``losses`` are means over users and thoughts; ``loss`` is their weighted sum, as added to the model's loss.
    """

    steps: list[ReasonerOutput]
    user_losses: dict[str, Tensor]  # [B], a user's mean over thoughts; 0 for users without a thought
    has_thought: Tensor  # bool [B]
    loss: Tensor = field(repr=False)

    @property
    def losses(self) -> dict[str, Tensor]:
        users = self.has_thought.sum().clamp_min(1)
        return {name: value.sum() / users for name, value in self.user_losses.items()}

    thought = property(lambda self: self.steps[-1].thought)
    attention = property(lambda self: self.steps[-1].attention)
    gates = property(lambda self: self.steps[-1].gates)
    contributions = property(lambda self: self.steps[-1].contributions)


@dataclass
class FLRCausalLMOutput(CausalLMOutputWithPast):
    """``CausalLMOutputWithPast`` plus ``flr``, None for a batch without a thought."""

    flr: FLROutput | None = None


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _looks_cheap(input_ids: Tensor) -> bool:
    """Whether reading token ids costs no device synchronisation, and there is more than a decoding step to read."""
    return input_ids.device.type == "cpu" and input_ids.shape[1] > 1


def _is_checkpointing(model: Any) -> bool:
    name = "is_activation_checkpointing"  # transformers >= 5.20; the old name warns there
    return getattr(model, name) if hasattr(type(model), name) else model.is_gradient_checkpointing


@dataclass
class _Inputs:
    """A batch while it is being encoded; columns are those of the shifted rows."""

    embeds: Tensor  # [B, L, D]
    mask: Tensor | dict | None  # [B, L], or prepared 4-D masks
    positions: Tensor | None  # [1 or B, L]
    is_thought: Tensor  # bool [B, L]
    reasoner_mask: Tensor | None  # bool [B, L]

    def cut(self, start: int, stop: int) -> dict[str, Any]:
        """Arguments of the base model for columns [start, stop); a 2-D mask spans the columns before them too."""
        mask = self.mask
        if isinstance(mask, dict):
            mask = {k: v if v is None else v[..., start:stop, :] for k, v in mask.items()}
        elif mask is not None and mask.dim() == 4:
            mask = mask[..., start:stop, :]
        elif mask is not None:
            mask = mask[:, :stop]
        positions = None if self.positions is None else self.positions[..., start:stop]
        return {"inputs_embeds": self.embeds[:, start:stop], "attention_mask": mask, "position_ids": positions}

    def valid(self, stop: int) -> Tensor | None:
        """bool [B, stop] of the tokens before column ``stop`` that factors may attend to."""
        mask = self.mask
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is not None and mask.dim() == 4:
            row = mask[:, 0, stop - 1, :stop]
            mask = row if row.dtype == torch.bool else row == 0
            mask = mask.expand(len(self.embeds), stop)
        valid = None if mask is None else mask[:, :stop].bool()
        if self.reasoner_mask is not None:
            narrowed = self.reasoner_mask[:, :stop] | self.is_thought[:, :stop]
            valid = narrowed if valid is None else narrowed & valid
        return valid


def _columns(is_thought: Tensor) -> list[int]:
    return is_thought.any(0).nonzero()[:, 0].tolist()


def _shift_rows(is_thought: Tensor, mask: Tensor | None) -> Tensor | None:
    """Source column [B, L'] of every column after shifting rows to a common first thought; None if they agree.

    -1 stands for padding. Rows without a thought keep all their tokens before that column.
    """
    first = is_thought.int().argmax(1)
    has = is_thought.any(1)
    if not has.any() or (first[has] == first[has][0]).all():
        return None
    length = is_thought.shape[1]
    columns = torch.arange(length, device=is_thought.device)
    seen = torch.ones_like(is_thought) if mask is None else mask.bool()
    lowest = torch.where(seen, columns, length).amin(1)
    highest = torch.where(seen, columns, -1).amax(1)
    common = int(first[has].max())
    shift = torch.where(has, common - first, common - 1 - highest)
    empty = highest < 0
    shift[empty], lowest[empty], highest[empty] = 0, common, common
    low, high = int((lowest + shift).min()), int((highest + shift).max())
    source = torch.arange(low, high + 1, device=is_thought.device) - shift[:, None]
    return source.masked_fill((source < 0) | (source >= length), -1)


def _take(x: Tensor, source: Tensor, fill: float) -> Tensor:
    """Columns of x [B, L, …] by ``source`` [B, L'], ``fill`` where it is -1."""
    rows = torch.arange(len(source), device=source.device)[:, None]
    taken = x[rows, source.clamp_min(0)]
    return taken.masked_fill((source < 0).view(*source.shape, *[1] * (x.dim() - 2)), fill)


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states [..., D], as the model's own forward computes them."""
    return scale_logits(model, model.get_output_embeddings()(hidden))


def scale_logits(model: Any, logits: Tensor) -> Tensor:
    """What follows the lm_head in ``model``, element by element."""
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def _row_losses(model: Any, hidden: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy [M] of hidden [M, D] against target [M]; 0 where the target is -100."""

    def block(h: Tensor, t: Tensor) -> Tensor:
        logits = head(model, h).float() if h.dtype != torch.float64 else head(model, h)
        return cross_entropy(logits, t, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)

    vocab = model.config.get_text_config().vocab_size
    if hidden.shape[0] * vocab <= MAX_LOSS_LOGITS:
        return block(hidden, target)
    step = max(1, MAX_LOSS_LOGITS // (4 * vocab))
    parts = [
        checkpoint(block, hidden[i : i + step], target[i : i + step], use_reentrant=False)
        for i in range(0, hidden.shape[0], step)
    ]
    return torch.cat(parts)


class _Encoder:
    """Runs the base model over the pieces of one batch and makes the thoughts between them."""

    def __init__(self, model: Any, config: FLRConfig, inputs: _Inputs, cache, use_cache: bool, kwargs):
        self.model, self.config, self.inputs = model, config, inputs
        self.cache, self.use_cache, self.kwargs = cache, use_cache, kwargs
        self.hidden: list[Tensor] = []  # last layer, piece by piece
        self.layers: list[tuple[Tensor, ...]] = []  # all layers, when asked for
        self.done = 0  # columns encoded
        self.steps: list[ReasonerOutput] = []
        self.step_rows: list[Tensor] = []
        self.anchor: Tensor | None = None

    def encode(self, stop: int) -> None:
        """Encode columns up to ``stop``."""
        start = self.done if self.use_cache else 0
        if stop <= start:
            return
        out = self.model.base_model(
            **self.inputs.cut(start, stop),
            past_key_values=self.cache if self.use_cache else None,
            use_cache=self.use_cache,
            return_dict=True,
            **self.kwargs,
        )
        if not self.use_cache:
            self.hidden, self.layers = [], []
        self.cache = out.past_key_values
        self.hidden.append(out.last_hidden_state)
        if out.hidden_states is not None:
            self.layers.append(out.hidden_states)
        self.done = stop

    def last_hidden(self) -> Tensor:
        return self.hidden[0] if len(self.hidden) == 1 else torch.cat(self.hidden, 1)

    def think(self, column: int, given: Tensor | None = None) -> None:
        """Put the thought, or the embedding ``given`` [B, D], into ``column`` of the rows that have one there."""
        x, config = self.inputs, self.config
        rows = x.is_thought[:, column]
        before = max(column - 1, 0)
        if config.anchor == "none":
            anchor = torch.zeros_like(x.embeds[:, column])
        elif config.anchor == "token":
            anchor = x.embeds[:, column]
        elif self.anchor is None:
            anchor = x.embeds[:, before] if column else torch.zeros_like(x.embeds[:, column])
        else:  # a later thought keeps the anchor of the one before it
            anchor = torch.where(x.is_thought[:, before, None], self.anchor, x.embeds[:, before])
        self.anchor = anchor
        embedding = anchor
        if given is not None:
            embedding = given
        elif config.variant in ("flr", "latentr3"):
            history = self.last_hidden() if self.hidden else x.embeds[:, :0]
            out = self.model.flr(history, x.valid(column) if column else None, column - 1)
            r = torch.nn.functional.dropout(out.thought, config.dropout, self.model.training)
            embedding = anchor + r.to(anchor.dtype)
            self.steps.append(out)
            self.step_rows.append(rows)
        is_here = torch.arange(x.embeds.shape[1], device=rows.device) == column
        here = (rows[:, None] & is_here)[..., None]
        x.embeds = torch.where(here, embedding[:, None].to(x.embeds.dtype), x.embeds)

    def output(self, weights: Tensor | None) -> FLROutput | None:
        """The thoughts; ``weights`` [B] are the users' shares in the loss, None for equal ones."""
        if not self.steps:
            return None
        seen = torch.stack(self.step_rows).to(torch.int64)  # [steps, B]
        count = seen.sum(0).clamp_min(1)
        losses = {
            name: sum(s.user_losses[name] * n for s, n in zip(self.steps, seen, strict=True)) / count for name in LOSSES
        }
        has = seen.any(0)
        dtype = self.steps[0].thought.dtype
        share = has.to(dtype) / has.sum().clamp_min(1) if weights is None else weights.to(dtype) * has
        total = sum(getattr(self.config, f"{name}_weight") * (losses[name] * share).sum() for name in LOSSES)
        return FLROutput(self.steps, losses, has, total)


def flr_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values=None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    reasoner_mask: Tensor | None = None,
    thought_start: int | None = None,
    skip_logits: bool | None = None,
    label_smoothing: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    catalogue: CatalogueLoss | None = None,
    thoughts: Tensor | None = None,
    group: GroupInputs | None = None,
    **kwargs,
) -> Any:
    """Forward of a patched model: that of the model it was, plus

    Args:
        reasoner_mask: bool [B, L]; narrows what the factors attend to, e.g. to item tokens. None for the whole prompt.
        thought_start: a promise that every row's first thought stands in this column and no label before it; saves a
            look at the data (one device synchronisation).
        skip_logits: return no logits, only the loss. Default: in training with labels.
        label_smoothing: of the cross-entropy, in [0, 1).
        num_items_in_batch: divisor of the summed cross-entropy (as ``Trainer`` passes it under gradient
            accumulation and data parallelism); each user's regularisers are then weighted by its share of the target
            tokens, so that any split of a batch gives the same sum.
        catalogue: normalise target tokens over their siblings in the catalogue instead of the vocabulary; ``labels`` are
            then ``catalogue.edges(labels)``.
        thoughts: [B, N, D], embeddings for the thought tokens instead of the reasoner's; in the same columns in every row.
        group: the result is then the :class:`flr.model.outputs.GroupOutput` of a latent GRPO step.

    A thought token is recognised in ``input_ids`` only, and belongs to the prompt: after a prefill (``past_key_values``
    not empty) the prompt's hidden states are gone, and one among several tokens raises (on the CPU, where a look is free).
    """
    if group is not None:
        from .group_forward import group_forward  # it stands on this module

        return group_forward(self, input_ids, attention_mask, position_ids, reasoner_mask, group)
    config: FLRConfig = self._flr_patch.config
    return_dict = kwargs.pop("return_dict", None)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    plain = input_ids is None or config.thought_count == 0 or past > 0
    is_thought: Any = None
    if input_ids is not None and config.thought_count and (past == 0 or _looks_cheap(input_ids)):
        is_thought = input_ids == config.thought_token_id
        if past > 0 and bool(is_thought.any()):
            raise ValueError("input_ids: expected no thought token after the prefill, got one; pass it with the prompt")
        plain = plain or (thought_start is None and not bool(is_thought.any()))
    if plain and labels is None:  # nothing of ours: the model as it was
        return self._flr_patch.original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
            **({} if return_dict is None else {"return_dict": return_dict}),
        )
    kwargs.pop("cache_position", None)  # of the whole input; a piece's follows from the cache
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False for a batch that is encoded in pieces, got True")
    if inputs_embeds is None:
        inputs_embeds = self.get_input_embeddings()(input_ids)
    if is_thought is None:
        is_thought = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    if reasoner_mask is not None and reasoner_mask.shape != is_thought.shape:
        raise ValueError(f"reasoner_mask: expected shape {tuple(is_thought.shape)}, got {tuple(reasoner_mask.shape)}")

    checkpointing = self.training and _is_checkpointing(self)
    if checkpointing and not plain:
        _say_once("gradient checkpointing excludes the KV cache: the prompt is encoded once more for every thought")
    keep_cache = (use_cache if use_cache is not None else past_key_values is not None) and not checkpointing
    inputs = _Inputs(inputs_embeds, attention_mask, position_ids, is_thought, reasoner_mask)
    targets = labels
    source = None
    two_dimensional = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
    if thought_start is None and not keep_cache and not plain and two_dimensional:
        source = _shift_rows(is_thought, attention_mask)
    if source is not None:
        if position_ids is None:
            position_ids = torch.arange(is_thought.shape[1], device=is_thought.device)
        positions = position_ids.expand(is_thought.shape)
        seen = torch.ones_like(is_thought) if attention_mask is None else attention_mask
        inputs = _Inputs(
            embeds=_take(inputs_embeds, source, 0),
            mask=_take(seen, source, 0),
            positions=_take(positions, source, 0),
            is_thought=_take(is_thought, source, False),
            reasoner_mask=None if reasoner_mask is None else _take(reasoner_mask, source, False),
        )
        targets = None if labels is None else _take(labels, source, IGNORE)

    if thought_start is not None and not plain:
        columns = list(range(thought_start, thought_start + config.num_thoughts))
    else:
        columns = _columns(inputs.is_thought) if not plain else []
    if skip_logits is None:
        skip_logits = self.training and labels is not None
    width = inputs.embeds.shape[1]
    # the last token predicts nothing: it needs no forward when only the loss is wanted
    stop = (
        width - 1
        if skip_logits and not keep_cache and width > 1 and (not columns or columns[-1] < width - 1)
        else width
    )

    encoder = _Encoder(self, config, inputs, past_key_values, not checkpointing, kwargs)
    if thoughts is not None and (len(thoughts), thoughts.shape[1]) != (len(is_thought), len(columns)):
        raise ValueError(
            f"thoughts: expected [{len(is_thought)}, {len(columns)}, D] for these columns, got {tuple(thoughts.shape)}"
        )
    for n, column in enumerate(columns):
        encoder.encode(column)
        encoder.think(column, None if thoughts is None else thoughts[:, n])
    encoder.encode(stop)

    loss = weights = None
    if targets is not None:
        loss, weights = _loss(self, encoder, targets, label_smoothing, num_items_in_batch, thought_start, catalogue)
    made = encoder.output(weights)
    if loss is not None and made is not None:
        loss = loss + made.loss
    logits = None
    if not skip_logits:
        hidden = encoder.last_hidden()
        if source is not None:
            hidden = _take(hidden, _inverse(source, is_thought.shape[1]), 0)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = hidden if isinstance(keep, int) else hidden[:, keep]
        logits = head(self, hidden)
    layers = None
    if encoder.layers:
        layers = tuple(torch.cat(parts, 1) for parts in zip(*encoder.layers, strict=True))
        if source is not None:
            inverse = _inverse(source, is_thought.shape[1])
            layers = tuple(_take(x, inverse, 0) for x in layers)
    out = FLRCausalLMOutput(
        loss=loss,
        logits=logits,
        past_key_values=encoder.cache if keep_cache else None,
        hidden_states=layers,
        flr=made,
    )
    return out.to_tuple() if return_dict is False else out


def _inverse(source: Tensor, length: int) -> Tensor:
    """Where each original column went: the inverse of :func:`_shift_rows`'s map, -1 for dropped padding."""
    inverse = source.new_full((len(source), length + 1), -1)
    columns = torch.arange(source.shape[1], device=source.device).expand_as(source)
    slot = torch.where(source < 0, length, source)
    return inverse.scatter(1, slot, columns)[:, :length]


def _loss(
    model: Any,
    encoder: _Encoder,
    labels: Tensor,
    smoothing: float,
    num_items: Tensor | int | None,
    thought_start: int | None,
    catalogue: CatalogueLoss | None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy over target tokens, and users' shares in the regularisers (None for equal ones)."""
    fixed_shapes = thought_start is not None and encoder.use_cache  # labels stand in the last piece only
    hidden = encoder.hidden[-1] if fixed_shapes else encoder.last_hidden()
    offset = encoder.done - hidden.shape[1]
    next_label = labels[:, offset + 1 : offset + 1 + hidden.shape[1]]
    hidden = hidden[:, : next_label.shape[1]]
    counts = (next_label != IGNORE).sum(1)  # [B]
    if fixed_shapes:
        hidden, target = hidden.flatten(0, 1), next_label.flatten()
    else:
        chosen = next_label != IGNORE
        hidden, target = hidden[chosen], next_label[chosen]
    total = (_row_losses if catalogue is None else catalogue)(model, hidden, target, smoothing).sum()
    if num_items is None:
        return total / counts.sum().clamp_min(1), None
    return total / num_items, counts / num_items
