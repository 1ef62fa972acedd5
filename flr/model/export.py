"""Prompt and thought as a program of ``torch.export``: what an engine runs before it decodes.

The program is the forward of a patched model in eval mode, traced: it encodes prompts, makes their N thoughts and
gives what a decoder goes on from. Our operations stand in it as their definitions in plain PyTorch
(``flr_kernels.reference``) and the weights lie in the file, so that ``torch.export.load`` runs it where neither this
package nor transformers is.

    inputs   input_ids       int64 [B, L], prompts without thought tokens, padded on the left
             attention_mask  int64 [B, L], 0 for padding
             reasoner_mask   bool [B, L], the tokens that factors may attend to (the history's items); all of the prompt
                             is ``attention_mask.bool()``
    outputs  thoughts        [B, N, D], what stands in the place of the N thought tokens behind the prompt
             hidden          [B, D], the last layer's state behind the last thought
             logits          [B, V], of the token behind it
             keys, values    lists of a tensor [B, H, L + N, d] a layer, rotary positions applied
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from flr_kernels import reference

from .backbone import attention_types, causal_lm, evaluating, fixed_shapes, is_patched, position_limit, takes_positions
from .batch import Batch, encode, plain_pieces
from .head import head
from .outputs import ThoughtInputs
from .verify import traits_of

#: A program's inputs and outputs, in order.
INPUTS = ("input_ids", "attention_mask", "reasoner_mask")
OUTPUTS = ("thoughts", "hidden", "logits", "keys", "values")
#: Rows and columns of the batch that is traced; any others but 0 and 1 would do.
_TRACED = (3, 5)
#: Prompts of a model whose config bounds nothing.
_LONGEST = 4096


class PromptProgram(nn.Module):
    """The computation that :func:`export_prompt` traces.

    Args:
        model: patched causal LM in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, reasoner_mask: Tensor) -> dict[str, Any]:
        """Outputs by name; inputs and outputs are those of the module's docstring."""
        config, start = self.model._flr_patch.config, input_ids.shape[1]
        behind = (0, config.num_thoughts)
        ids = pad(input_ids, behind, value=config.thought_token_id)
        mask, narrowed = pad(attention_mask, behind, value=1), pad(reasoner_mask, behind, value=False)
        positions = (mask.cumsum(1) - 1).clamp_min(0) if takes_positions(self.model) else None
        columns = torch.arange(ids.shape[1], device=ids.device)
        is_thought = (columns >= start).expand(ids.shape)
        pieces = plain_pieces(self.model.get_input_embeddings()(ids), mask, positions, is_thought, narrowed)
        encoded = encode(self.model, Batch(pieces, None, None, None, True), ThoughtInputs(thought_start=start), {})
        hidden = encoded.states()[:, -1:]
        cache = encoded.encoder.cache
        layers = getattr(cache, "self_attention_cache", cache).layers  # of decoders that could be given an encoder
        return {
            "thoughts": encoded.encoder.inputs.embeds[:, start:],
            "hidden": hidden[:, 0],
            "logits": head(self.model, hidden)[:, 0],
            "keys": [layer.keys for layer in layers],
            "values": [layer.values for layer in layers],
        }


@torch.no_grad()
def export_prompt(model: nn.Module, max_length: int | None = None) -> torch.export.ExportedProgram:
    """Trace prompt and thought; ``torch.export.save`` writes the result.

    Args:
        model: patched causal LM whose thought is one state (not a mixture), without an adapter.
        max_length: tokens of the longest prompt. Default: what the model has positions for, at most 4096.

    Returns:
        A program for any number of prompts of 1 to ``max_length`` tokens, in the model's dtypes, on its device.

    Raises:
        ValueError: a model without one thought, one that cannot go on from a cache of keys and values, whose layers
            look through a window that a prompt can be longer than, or that torch.export does not take; ``max_length``
            is out of range.

    Example:
        >>> import flr
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
        >>> program = export_prompt(flr.patch_model(model, config=flr.FLRConfig(thought_token_id=19)))
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> program.module()(ids, torch.ones_like(ids), ids > 1)["thoughts"].shape
        torch.Size([1, 1, 16])
    """
    longest = longest_prompt(model, max_length)
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    ids = torch.zeros(_TRACED, dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    sizes = {0: torch.export.Dim.DYNAMIC(min=1), 1: torch.export.Dim.DYNAMIC(min=1, max=longest)}
    with evaluating(lm), fixed_shapes():
        try:
            program = torch.export.export(
                PromptProgram(lm),
                (ids, mask, mask.bool()),
                dynamic_shapes=dict.fromkeys(INPUTS, sizes),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = program.run_decompositions(_definitions())
        except Exception as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"model: expected one that torch.export takes, got {type(lm).__name__}: {type(error).__name__}: "
                f"{told:.300}"
            ) from error
    _check_traced(program, lm, longest)
    return program


def _check(model: nn.Module, lm: Any) -> None:
    """Raise for a model whose prompt and thought are no such program."""
    if not is_patched(lm) or not lm._flr_patch.config.thought_count:
        raise ValueError(f"model: expected one with a thought, got {type(lm).__name__} without")
    if lm._flr_patch.config.mixes:
        raise ValueError("model: expected factors that add up to one thought, got aggregation 'mixture'")
    if lm is not model or hasattr(lm, "peft_config"):
        raise ValueError("model: expected a whole model (flr merge makes one), got an adapter")
    traits = vars(traits_of(lm))
    missing = [name for name in ("embeds", "pieces", "left_padding", "plain_cache") if not traits[name]]
    if missing:
        raise ValueError(
            "model: expected a family that reads embeddings and goes on from a plain cache of keys and values, "
            f"got {type(lm).__name__} without {' and '.join(missing)} (docs/families.md)"
        )


def longest_prompt(model: nn.Module, asked: int | None = None) -> int:
    """Tokens of the longest prompt of an export: with its thoughts it has positions, and no window of a layer moves.

    Raises:
        ValueError: as :func:`export_prompt`, but for what the trace alone shows.
    """
    lm = causal_lm(model)
    _check(model, lm)
    config, thoughts = lm.config.get_text_config(decoder=True), lm._flr_patch.config.num_thoughts
    bounds = {"positions": position_limit(lm.config)}
    if attention_types(config) != {"full_attention"}:
        window = getattr(config, "sliding_window", None)
        if window is None:
            raise ValueError(f"model: expected layers of full attention, got {sorted(attention_types(config))}")
        bounds["tokens before its layers' window moves"] = window - 2  # transformers' cache keeps one less
    most, why = min(((size, name) for name, size in bounds.items() if size is not None), default=(None, ""))
    room = None if most is None else most - thoughts
    longest = min(_LONGEST, room or _LONGEST) if asked is None else asked
    if longest <= _TRACED[1] or (room is not None and longest > room):
        bound = (
            "" if room is None else f" and at most {room}, since the model has {most} {why}, {thoughts} for thoughts"
        )
        raise ValueError(f"max_length: expected more than {_TRACED[1]}{bound}, got {longest}")
    return longest


def _definitions() -> dict[Any, Callable[..., Any]]:
    """Our operations as what defines them."""

    def attention(h: Tensor, u: Tensor, mask: Tensor | None, last_first: bool = False) -> Any:
        return reference.factor_attention(h, u, mask)

    ops = torch.ops.flr
    return {ops.factor_attention.default: attention, ops.factor_aggregate.default: reference.factor_aggregate}


def _check_traced(program: torch.export.ExportedProgram, lm: Any, longest: int) -> None:
    """Raise where the trace holds for some sizes alone, or needs this package."""
    left = sorted({str(node.target) for node in program.graph.nodes if str(node.target).startswith("flr")})
    shape = next(node for node in program.graph.nodes if node.name == INPUTS[0]).meta["val"].shape
    known = [program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None)) for size in shape]
    if left or None in known or known[0].lower > 2 or known[1].lower > 2 or known[1].upper < longest:
        ranges = [str(one) for one in known]
        raise ValueError(
            f"model: expected a trace for any batch and 1 to {longest} tokens, got sizes {ranges} and {left} from "
            f"{type(lm).__name__}"
        )
