"""The forward of a patched causal LM: the prompt is encoded once, the thought is made, only the rest follows.

Attention is causal, so neither the prompt's hidden states nor its keys and values depend on the thought. The input is
cut at the thought columns c_1 < c_2 < … and the base model runs over each piece once, on one KV cache:

    [0, c_1) ──> H ──> reasoner ──> embedding at c_1;   [c_1, c_2) ──> more of H ──> …;   [c_n, L)

Rows whose thoughts stand in different columns are shifted (whole rows, so that distances between tokens stay) until
the first thoughts share a column. The lm_head runs only on rows that have a label, or that the caller asked for.
Where no KV cache can be used (gradient checkpointing) every piece starts from column 0 again: the two-pass way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flr.config import IGNORE, FLRConfig

if TYPE_CHECKING:
    from .catalogue_loss import CatalogueLoss
    from .outputs import GroupInputs
from .backbone import is_checkpointing, warn_once
from .encoder import Encoder
from .head import head, row_losses
from .outputs import FLRCausalLMOutput
from .pieces import Pieces, inverse_columns, shift_rows, take_columns, thought_columns


def _looks_cheap(input_ids: Tensor) -> bool:
    """Whether reading token ids costs no device synchronisation, and there is more than a decoding step to read."""
    return input_ids.device.type == "cpu" and input_ids.shape[1] > 1


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

    checkpointing = self.training and is_checkpointing(self)
    if checkpointing and not plain:
        warn_once("gradient checkpointing excludes the KV cache: the prompt is encoded once more for every thought")
    keep_cache = (use_cache if use_cache is not None else past_key_values is not None) and not checkpointing
    inputs = Pieces(inputs_embeds, attention_mask, position_ids, is_thought, reasoner_mask)
    targets = labels
    source = None
    two_dimensional = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
    if thought_start is None and not keep_cache and not plain and two_dimensional:
        source = shift_rows(is_thought, attention_mask)
    if source is not None:
        if position_ids is None:
            position_ids = torch.arange(is_thought.shape[1], device=is_thought.device)
        positions = position_ids.expand(is_thought.shape)
        seen = torch.ones_like(is_thought) if attention_mask is None else attention_mask
        inputs = Pieces(
            embeds=take_columns(inputs_embeds, source, 0),
            mask=take_columns(seen, source, 0),
            positions=take_columns(positions, source, 0),
            is_thought=take_columns(is_thought, source, False),
            reasoner_mask=None if reasoner_mask is None else take_columns(reasoner_mask, source, False),
        )
        targets = None if labels is None else take_columns(labels, source, IGNORE)

    if thought_start is not None and not plain:
        columns = list(range(thought_start, thought_start + config.num_thoughts))
    else:
        columns = thought_columns(inputs.is_thought) if not plain else []
    if skip_logits is None:
        skip_logits = self.training and labels is not None
    width = inputs.embeds.shape[1]
    # the last token predicts nothing: it needs no forward when only the loss is wanted
    stop = (
        width - 1
        if skip_logits and not keep_cache and width > 1 and (not columns or columns[-1] < width - 1)
        else width
    )

    encoder = Encoder(self, config, inputs, past_key_values, not checkpointing, kwargs)
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
            hidden = take_columns(hidden, inverse_columns(source, is_thought.shape[1]), 0)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = hidden if isinstance(keep, int) else hidden[:, keep]
        logits = head(self, hidden)
    layers = None
    if encoder.layers:
        layers = tuple(torch.cat(parts, 1) for parts in zip(*encoder.layers, strict=True))
        if source is not None:
            inverse = inverse_columns(source, is_thought.shape[1])
            layers = tuple(take_columns(x, inverse, 0) for x in layers)
    out = FLRCausalLMOutput(
        loss=loss,
        logits=logits,
        past_key_values=encoder.cache if keep_cache else None,
        hidden_states=layers,
        flr=made,
    )
    return out.to_tuple() if return_dict is False else out


def _loss(
    model: Any,
    encoder: Encoder,
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
    total = (row_losses if catalogue is None else catalogue)(model, hidden, target, smoothing).sum()
    if num_items is None:
        return total / counts.sum().clamp_min(1), None
    return total / num_items, counts / num_items
