"""What ours must equal, computed the long way: every sequence encoded in full, user by user and item by item."""

from __future__ import annotations

import torch

from tests.helpers.inputs import row_of
from tests.helpers.models import THOUGHT


def naive_forward(model, input_ids, attention_mask, labels, position_ids=None, reasoner_mask=None):
    """Loss and logits with the whole sequence encoded once more for every thought: N + 1 passes, user by user."""
    config, original = model._flr_patch.config, model._flr_patch.original(model)
    embeds = model.get_input_embeddings()(input_ids)
    kwargs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    regularisers = []
    for n in range(config.num_thoughts):
        hidden = model.base_model(inputs_embeds=embeds, **kwargs).last_hidden_state
        embeds = embeds.clone()
        for b, row in enumerate(input_ids):
            where = (row == THOUGHT).nonzero()[:, 0]
            if len(where) == 0:
                continue
            first, column = int(where[0]), int(where[n])
            valid = attention_mask[b, :column].bool()
            if reasoner_mask is not None:
                valid = valid & (reasoner_mask[b, :column] | (row[:column] == THOUGHT))
            out = model.flr(hidden[b : b + 1, :column], valid[None], column - 1)
            anchors = model.get_input_embeddings()(row)
            anchor = {"token": anchors[column], "last": anchors[first - 1], "none": torch.zeros_like(anchors[0])}
            embeds[b, column] = anchor[config.anchor] + out.thought[0].to(embeds.dtype)
            regularisers.append(out.losses)
    logits = original(inputs_embeds=embeds, **kwargs).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:].flatten()
    )
    for name in ("orthogonality", "diversity", "sparsity"):
        weight = getattr(config, f"{name}_weight")
        loss = loss + weight * torch.stack([r[name] for r in regularisers]).mean() if regularisers else loss
    return loss, logits


@torch.no_grad()
def naive_scores(model, inputs, sequences, scoring="full", allowed=None) -> torch.Tensor:
    """[B, C]: a full forward, without padding or cache, for every user and item."""
    rows, device = len(inputs["input_ids"]), model.device
    allowed = torch.ones(len(sequences), dtype=torch.bool) if allowed is None else allowed
    allowed = allowed.expand(rows, len(sequences))
    scores = torch.full((rows, len(sequences)), -torch.inf)
    for row in range(rows):
        prompt = row_of(inputs, row)
        candidates = [s for s, ok in zip(sequences, allowed[row], strict=True) if ok]
        for item, sequence in enumerate(sequences):
            if not allowed[row, item]:
                continue
            ids = torch.cat([prompt, torch.tensor(sequence)])[None].to(device)
            extra = {}
            if "reasoner_mask" in inputs:  # of a patched model
                own = inputs["reasoner_mask"][row][inputs["attention_mask"][row].bool()]
                extra["reasoner_mask"] = torch.cat([own, torch.zeros(len(sequence), dtype=torch.bool)])[None]
            logits = model(input_ids=ids, use_cache=False, **extra).logits[0].float()[len(prompt) - 1 : -1]
            total = 0.0
            for step, token in enumerate(sequence):
                siblings = sorted({s[step] for s in candidates if len(s) > step and s[:step] == sequence[:step]})
                row_logits = logits[step] if scoring == "full" else logits[step, siblings]
                total += float(logits[step, token] - row_logits.logsumexp(0))
            scores[row, item] = total
    return scores
