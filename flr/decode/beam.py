"""Beam search that can only emit items of a catalogue.

One step: every hypothesis' children in the trie are gathered, those without an allowed item below them are dropped, the
rest is scored and the best W go on. Nothing loops over beams or users.

Two scorings, each exact for what it defines:
  full       sum of log softmax over the whole vocabulary, at every token of the item
  catalogue  the same with the softmax over the node's children that lead to allowed items: probabilities over the
             allowed items sum to 1
Semantics are those of transformers' ``generate(num_beams=W, early_stopping="never")`` under a prefix constraint:
  * a continuation that completes an item is kept if it ranks among the best max(W, k) of all continuations of the step,
    it takes no beam from the unfinished ones, of which the best W go on;
  * the search ends when no unfinished hypothesis can still enter the best k.
So with W >= C it is exact. A step of ``full`` is a token. A step of ``catalogue`` leads from branching to branching
of the trie of allowed items: tokens without alternative have log-probability 0, the model reads them together with the
next choice, and an item is complete where nothing else can follow. Its logits are computed for the children alone.
On a CPU ``full`` reads the levels at which no hypothesis branches in one forward, too (see ``runs``).
Ties: among continuations the smaller leaf position (lexicographically smaller tokens) wins, among items the index.

Where the predictions of several thoughts are mixed (:mod:`flr.decode.mixed_search`), a hypothesis' probability is the
mixture's, Σ_k g_k p_k, under either scoring, and all of the above holds.

On a GPU a step is a product with lm_head rows and three kernels (see ``kernel_search``); inside the loop of ``full``
the host does not wait for the device, in that of ``catalogue`` once a step, for the number of tokens of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flr.config import check_normalisation
from flr.data.trie import CatalogueTrie
from flr.model.backbone import causal_lm, evaluating
from flr_kernels.ops.trie_step.op import runs_as_kernel

from . import graphs
from .filters import item_filter
from .kernel_search import KernelSearch
from .mixed_search import MixedSearch
from .prompts import Prompts, num_prompts
from .scoring import Scoring, check_vocabulary
from .search import BeamResult, Search, nothing_found
from .ways import ways_together


@torch.no_grad()
def beam_search(
    model: nn.Module,
    inputs: Mapping[str, Any],
    trie: CatalogueTrie,
    num_beams: int = 20,
    k: int = 10,
    scoring: Scoring = "full",
    allowed: torch.Tensor | None = None,
    length_penalty: float = 0.0,
    exclude: torch.Tensor | None = None,
    *,
    only: torch.Tensor | None = None,
    categories: torch.Tensor | None = None,
    wanted: torch.Tensor | int | None = None,
    prompts: Prompts | None = None,
    renormalise: bool = True,
) -> BeamResult:
    """The k best items for each user's prompt.

    The model is run in eval mode (restored afterwards); its ``generation_config`` is not looked at. The caller chunks
    users: memory is that of the prompt's cache plus, in ``full``, B·W·V logits.

    Args:
        model: causal LM of transformers, patched or not.
        inputs: of the prompts: input_ids int64 [B, L] padded on the left, attention_mask, position_ids and whatever
            else the model takes at its prefill, e.g. a processor's output.
        trie: the catalogue; moved to the model's device if it is elsewhere (keep it there when calling often).
        num_beams: W >= 1.
        k: how many items to return; more than W may not all be found.
        scoring: "full" or "catalogue".
        allowed, exclude, only, categories, wanted: which items may be given, see ``item_filter``; None allows all.
        length_penalty: scores are divided by (tokens of the item) ** length_penalty.
        prompts: of these inputs where they are encoded already, with hidden states wanted for "catalogue" (see
            ``prefill``). The search uses them up.
        renormalise: False: under "catalogue", probabilities are those among the whole catalogue, though allowed items
            alone are given. Under "full" they always are.

    Returns:
        BeamResult of items int64 [B, k] and scores float32 [B, k] (log-probabilities when length_penalty is 0). An item
        whose probability is 0 is not returned. A user without allowed items gets -1 throughout.

    Raises:
        ValueError: an argument out of range, prompts padded on the right or encoded for the other scoring, a token
            outside the model's vocabulary.
        FloatingPointError: the model gave NaN or infinite logits where a choice had to be made.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    >>> trie = CatalogueTrie.from_sequences([5, 7, 5, 8, 6], [0, 2, 4, 5])    # items (5, 7), (5, 8), (6,)
    >>> found = beam_search(model, {"input_ids": torch.tensor([[1, 2, 3]])}, trie, num_beams=3, k=4)
    >>> sorted(found.items[0].tolist())
    [-1, 0, 1, 2]
    """
    check_normalisation("scoring", scoring)
    if num_beams < 1 or k < 1:
        raise ValueError(f"num_beams, k: expected at least 1, got {num_beams} and {k}")
    if num_prompts(inputs) == 0:
        return nothing_found(0, k, inputs["input_ids"].device)
    count = num_prompts(inputs) if prompts is None else len(prompts.states)
    trie = trie.to(next(causal_lm(model).parameters()).device if prompts is None else prompts.states.device)
    allows = item_filter(trie, count, allowed, exclude, only, categories, wanted)
    struck = allows if scoring == "catalogue" and not renormalise and not allows.all else None
    allows = allows if struck is None else item_filter(trie, count)
    arguments = (trie, allows, num_beams, k, scoring, length_penalty)
    with evaluating(model):
        log_weights, given = None, inputs if prompts is None else None
        if prompts is None:
            if (
                struck is None
                and (found := graphs.answer(model, inputs, lambda rows: KernelSearch(*arguments, rows))) is not None
            ):
                return found
            log_weights, prompts = ways_together(model, inputs, trie.depth, want_hidden=scoring == "catalogue")
        check_vocabulary(trie, prompts.vocabulary)
        if scoring == "full" and prompts.head_rows is not None:
            raise ValueError("prompts: expected logits as their states under scoring 'full', got hidden states")
        if log_weights is not None:
            return MixedSearch(log_weights, *arguments, prompts.head_rows, struck).run(prompts)
        if struck is not None:
            return Search(*arguments, prompts.head_rows, struck).run(prompts)
        kind = KernelSearch if runs_as_kernel(prompts.states, max(num_beams, k)) else Search
        search = kind(*arguments, prompts.head_rows)
        return graphs.run(model, search, prompts, given) or search.run(prompts)
