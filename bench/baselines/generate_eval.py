"""Evaluation of a latent-thought recommender: two encodings of the prompt, `generate`, a Python dictionary.

After LatentR3 (Shengxiang-Lin/LatentR3, src/latent/latent_attention_eval.py, layers.py and LogitProcesser.py at
a67bbca): the prompt is encoded once to make the thought, with logits of every token, and a second time by `generate`
for every beam; a logits processor asks a dictionary for the tokens that may follow each beam. Kindest reading: the
first encoding has a row a user, where the published code has one a beam, since `generate` has repeated the prompts
before; one log_softmax, where its processor has a second one; keys are tuples, not joined text. Its length penalty of 1
divides scores by lengths; here it is 0, as in ours.

Checked by running that code's model and processor, with the reasoner of this package in the place of its own layer, on
prompts padded on the left: the same items in the same order, scores within 1e-5 (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .constraint import PythonDict


class _Constraint(LogitsProcessor):
    def __init__(self, allowed: PythonDict) -> None:
        self.allowed = allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.allowed.constrain(input_ids, 0, scores)  # embeddings were given: input_ids holds new tokens alone


@torch.no_grad()
def think(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Embeddings [B, L, D] of prompts whose last token is the thought's, the thought put in."""
    prompt, mask = input_ids[:, :-1], attention_mask[:, :-1]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(
        input_ids=prompt, attention_mask=mask, position_ids=positions, output_hidden_states=True, insert_thought=False
    )
    thought = model.flr(out.hidden_states[-1], mask.bool(), prompt.shape[1] - 1).thought
    embeds = model.get_input_embeddings()(prompt)
    return torch.cat([embeds, thought[:, None].to(embeds.dtype)], dim=1)


@torch.no_grad()
def evaluate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    allowed: PythonDict,
    index: dict[tuple[int, ...], int],
    end: int,
    num_beams: int,
    with_scores: bool = False,
) -> list[list[tuple[int, float]]]:
    """Items and scores of every user, best first; scores are 0 unless asked for (generate then keeps those of every
    step).

    Args:
        model: patched with the variant "latentr3" and one thought.
        input_ids, attention_mask: prompts [B, L], left-padded, ending with the thought token.
        index: token sequence, `end` included, to item.
    """
    out = model.generate(
        insert_thought=False,
        inputs_embeds=think(model, input_ids, attention_mask),
        attention_mask=attention_mask,
        logits_processor=LogitsProcessorList([_Constraint(allowed)]),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        length_penalty=0.0,
        max_new_tokens=max(map(len, index)),
        eos_token_id=end,
        pad_token_id=end,
        return_dict_in_generate=True,
        output_scores=with_scores,
    )
    found: list[list[tuple[int, float]]] = [[] for _ in input_ids]
    scores = out.sequences_scores.tolist() if with_scores else [0.0] * len(out.sequences)
    for n, (ids, score) in enumerate(zip(out.sequences.tolist(), scores, strict=True)):
        tokens = tuple(ids[: ids.index(end) + 1]) if end in ids else tuple(ids)
        if tokens in index:  # not one that was still under way, or of probability 0
            found[n // num_beams].append((index[tokens], score))
    return found
