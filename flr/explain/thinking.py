"""Prompts whose thoughts are known part by part, and what the model makes of other thoughts in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from flr.decode.packed import obstacle
from flr.decode.prompts import Prompts, Thinking, prepare_inputs
from flr.decode.ways import thoughts_apart
from flr.model.backbone import cache_argument, cache_of, causal_lm, is_patched, packing_obstacle, takes_positions
from flr.model.base import attention_mask
from flr.model.encoder import thoughts_made
from flr.model.factor_mixture import FactorStates
from flr.model.folded_heads import folded_heads
from flr.model.outputs import FLROutput
from flr.model.verify import traits_of


@dataclass
class Tree:
    """n tokens behind a user's thought, breadth first: trie nodes whose states are wanted.

    Attributes:
        user: row among the prompts.
        tokens: int64 [n]. parents: int64 [n], index of the token before, -1 for the thought. depths: int64 [n], from 1.
    """

    user: int
    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def sees(self) -> np.ndarray:
        """bool [n, n]: each token itself and those before it."""
        out = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                out[node] |= out[parent]
        return out

    def paths(self) -> list[list[int]]:
        """Tokens from the thought to every one that none follows, as indices among the n."""
        found = []
        for end in np.setdiff1d(np.arange(len(self)), self.parents).tolist() or [-1]:
            path = []
            while end >= 0:
                path.append(end)
                end = int(self.parents[end])
            found.append(path[::-1])
        return found


@dataclass
class ThinkingPrompts:
    """Prompts of B users, encoded once, and the parts of their thoughts; L columns without those of N thoughts."""

    lm: Any
    embeds: Tensor  # [B, L, D]
    mask: Tensor  # int64 [B, L]
    positions: Tensor | None  # int64 [B, L + N]
    anchors: Tensor  # [B, N, D], the thought's embedding without factors
    contributions: Tensor  # [B, N, K, D], the parts g_k f_k of a thought, or f_k of its own thought in a mixture
    output: FLROutput
    log_gates: Tensor | None  # [B, K] of a mixture; None for one thought
    layers: list[Any] | None  # cache layers cut to L columns; None where this cache cannot be cut
    packs: bool  # whether a tree of tokens may be a row

    def states(self, trees: Sequence[Tree], thoughts: Tensor) -> Tensor:
        """Hidden states behind other thoughts.

        Args:
            trees: E trees. thoughts: [E, A, N, D], A thoughts for each, instead of the prompt's own.

        Returns:
            [E, A, 1 + n, D] after the thought and after each token, n of the largest tree; undefined past a tree's end.
        """
        return self._packed(trees, thoughts) if self.packs else self._by_paths(trees, thoughts)

    def _packed(self, trees: Sequence[Tree], thoughts: Tensor) -> Tensor:
        """Every tree a row behind the keys and values of its prompt, with a mask that says who follows whom."""
        count, length = thoughts.shape[2], max(map(len, trees))
        tokens, depths = np.zeros((2, len(trees), length), np.int64)
        sees = np.zeros((len(trees), count + length, count + length), bool)
        sees[:] = np.tri(count + length, dtype=bool) & (np.arange(count + length) < count)
        sees |= np.eye(count + length, dtype=bool)  # padding sees itself, too
        for row, tree in enumerate(trees):
            size = len(tree)
            tokens[row, :size], depths[row, :size] = tree.tokens, tree.depths
            sees[row, count : count + size, count : count + size] = tree.sees()
        users = self._on_device([tree.user for tree in trees])
        mask = torch.cat([self.mask[users].bool()[:, None].expand(-1, count + length, -1), self._on_device(sees)], -1)
        sets = thoughts.shape[1]
        config = self.lm.config.get_text_config(decoder=True)
        seen = attention_mask(config, mask, self.embeds.dtype).repeat_interleave(sets, 0)
        suffix = self._suffix(thoughts, tokens, depths)
        with folded_heads():
            hidden = self._forward(users.repeat_interleave(sets), *suffix, seen)
        return hidden[:, count - 1 :].unflatten(0, thoughts.shape[:2])

    def _by_paths(self, trees: Sequence[Tree], thoughts: Tensor) -> Tensor:
        """Every path of a tree a row of its own, for models that take no 4-D mask."""
        paths = [(row, path) for row, tree in enumerate(trees) for path in tree.paths()]
        tokens = np.zeros((len(paths), max(len(path) for _, path in paths)), np.int64)
        for place, (row, path) in enumerate(paths):
            tokens[place, : len(path)] = trees[row].tokens[path]
        depths = np.broadcast_to(np.arange(1, tokens.shape[1] + 1), tokens.shape)
        of, sets = self._on_device([row for row, _ in paths]), thoughts.shape[1]
        users = self._on_device([trees[row].user for row, _ in paths]).repeat_interleave(sets)
        embeds, behind = self._suffix(thoughts[of], tokens, depths)
        mask = torch.cat([self.mask[users], self.mask.new_ones(embeds.shape[:2])], 1)
        hidden = self._forward(users, embeds, behind, mask)[:, thoughts.shape[2] - 1 :].unflatten(0, (-1, sets))
        out = hidden.new_zeros(*thoughts.shape[:2], 1 + max(map(len, trees)), hidden.shape[-1])
        for place, (row, path) in enumerate(paths):
            out[row][:, [0, *(1 + node for node in path)]] = hidden[place, :, : 1 + len(path)]
        return out

    def _suffix(self, thoughts: Tensor, tokens: np.ndarray, depths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Embeddings [E·A, N + n, D] of thoughts [E, A, N, D] and tokens [E, n], and int64 their places from 1 - N."""
        sets, count = thoughts.shape[1:3]
        own = self.lm.get_input_embeddings()(self._on_device(tokens))
        embeds = torch.cat([thoughts, own[:, None].expand(-1, sets, -1, -1)], 2).flatten(0, 1)
        before = np.broadcast_to(np.arange(1 - count, 1), (len(depths), count))
        return embeds, self._on_device(np.concatenate([before, depths], 1)).repeat_interleave(sets, 0)

    def _forward(self, users: Tensor, suffix: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [R, S, D] of embeddings [R, S, D] behind the prompts of the users [R]."""
        inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": self.layers is not None}
        if self.layers is None:
            inputs["inputs_embeds"] = torch.cat([self.embeds[users], suffix], 1)
        else:
            layers = [copy.copy(layer) for layer in self.layers]
            for layer in layers:
                layer.keys, layer.values = layer.keys[users], layer.values[users]
            inputs |= {"inputs_embeds": suffix, **cache_argument(self.lm.base_model, Cache(layers=layers))}
        if self.positions is not None:
            known = self.positions[users]
            positions = torch.cat([known[:, : self.embeds.shape[1]], known[:, -1:] + places], 1)
            inputs["position_ids"] = positions[:, -inputs["inputs_embeds"].shape[1] :]
        hidden: Tensor = self.lm.base_model(**inputs).last_hidden_state
        return hidden[:, -suffix.shape[1] :]

    def _on_device(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.embeds.device)


@torch.no_grad()
def think(
    model: nn.Module, inputs: Mapping[str, Any], reserve: int, prompts: Prompts | None = None
) -> ThinkingPrompts | None:
    """Encode prompts with a patched model; None where its variant has no factors.

    Args:
        model: in eval mode. inputs: a processor's output for B prompts.
        reserve: how many tokens will follow the thoughts at most.
        prompts: of these inputs, from ``prefill``, if no session has gone on from them: they are not encoded again.
    """
    lm = causal_lm(model)
    if not is_patched(lm) or not lm._flr_patch.config.has_reasoner:
        return None
    if (apart := thoughts_apart(model, inputs)) is not None:
        return _thinking_apart(lm, *apart, reserve)
    config = lm._flr_patch.config
    made = None if prompts is None else prompts.thinking
    if made is None:
        prepared = prepare_inputs(model, inputs)
        if not takes_positions(lm):
            del prepared["position_ids"]
        out = lm(**prepared, use_cache=True, logits_to_keep=1)
        made = Thinking(prepared, out.flr, cache_of(out))
    given = made.prepared
    ids, count = given["input_ids"], config.num_thoughts
    if not bool((ids[:, -count:] == config.thought_token_id).all()):
        raise ValueError(f"inputs: expected prompts that end with {count} thought tokens")
    length = ids.shape[1] - count
    embeds = lm.get_input_embeddings()(ids)
    anchors = embeds[:, length:]
    if config.anchor == "none":
        anchors = torch.zeros_like(anchors)
    elif config.anchor == "last":
        anchors = embeds[:, length - 1 : length].expand_as(anchors)
    layers = _cut(made.past, length, length + count + reserve)
    return ThinkingPrompts(
        lm=lm,
        embeds=embeds[:, :length],
        mask=given["attention_mask"][:, :length],
        positions=given.get("position_ids"),
        anchors=anchors,
        contributions=torch.stack([step.contributions for step in made.output.steps], 1),
        output=made.output,
        log_gates=None,
        layers=layers,
        packs=layers is not None and _takes_masks(lm) and obstacle(model, made.past, length + count + reserve) is None,
    )


def _thinking_apart(lm: Any, states: FactorStates, prepared: Mapping[str, Any], reserve: int) -> ThinkingPrompts:
    config, (batch, length) = lm._flr_patch.config, states.history.shape[:2]
    cache, longest = states.members.cache, length + 1 + reserve
    goes_on = states.members.packed and _takes_masks(lm)
    goes_on = goes_on and cache is not None and obstacle(lm, cache, longest) is None
    everyone = torch.ones(batch, dtype=torch.bool, device=states.history.device)
    layers = _cut(cache, length, longest) if goes_on else None
    return ThinkingPrompts(
        lm=lm,
        embeds=states.prompt.embeds,
        mask=states.prompt.mask,
        positions=prepared["position_ids"] if takes_positions(lm) else None,
        anchors=states.anchor[:, None],
        contributions=states.made.factors[:, None],
        output=thoughts_made(config, [states.made], [everyone], None),
        log_gates=states.log_gates,
        layers=layers,
        packs=layers is not None,
    )


def _takes_masks(lm: Any) -> bool:
    return packing_obstacle(lm) is None and traits_of(lm).packing


def _cut(cache: Any, length: int, longest: int) -> list[Any] | None:
    """The cache's layers with their first ``length`` columns; None unless they hold every column and keep doing so."""
    layers = []
    for layer in getattr(cache, "layers", [None]):
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or (window is not None and longest >= window):
            return None
        if not layer.is_initialized:
            return None
        cut = copy.copy(layer)
        cut.keys, cut.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        if hasattr(cut, "cumulative_length"):
            cut.cumulative_length = length
        layers.append(cut)
    return layers
