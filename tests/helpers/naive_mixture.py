"""A mixture over factors computed the long way: rows without padding, a forward for every factor's thought."""

from __future__ import annotations

import torch

from tests.helpers.models import THOUGHT


def factor_logits(model, ids, narrowed=None):
    """Log gates [K], logits [K, L - c, V] from the thought's column c on, and the reasoner's losses, of one row [L]."""
    config, original = model._flr_patch.config, model._flr_patch.original(model)
    column = int((ids == THOUGHT).nonzero()[0, 0])
    embeds = model.get_input_embeddings()(ids)[None]
    history = model.base_model(inputs_embeds=embeds[:, :column], use_cache=False).last_hidden_state
    mask = None if narrowed is None else narrowed[None, :column]
    out = model.flr(history, mask, column - 1)
    anchor = {"token": embeds[0, column], "last": embeds[0, column - 1], "none": torch.zeros_like(embeds[0, 0])}
    logits = []
    for factor in out.factors[0]:
        thought = anchor[config.anchor] + factor.to(embeds.dtype)
        row = torch.cat([embeds[0, :column], thought[None], embeds[0, column + 1 :]])
        logits.append(original(inputs_embeds=row[None], use_cache=False).logits[0, column:])
    return out.gates[0, -1].log(), torch.stack(logits), out.losses


def rows_of(batch, name):
    """The tokens of each row, without padding."""
    return [x[m.bool()] for x, m in zip(batch[name], batch["attention_mask"], strict=True)]


def naive_loss(model, batch):
    """The loss of a batch with labels; regularisers are means over users."""
    config, total, regularisers = model._flr_patch.config, 0.0, []
    masks = rows_of(batch, "reasoner_mask") if "reasoner_mask" in batch else [None] * len(batch["input_ids"])
    for ids, labels, narrowed in zip(rows_of(batch, "input_ids"), rows_of(batch, "labels"), masks, strict=True):
        log_gates, logits, losses = factor_logits(model, ids, narrowed)
        target = labels[len(ids) - logits.shape[1] :][1:]
        logprobs = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        seen = target != -100
        own = logprobs[:, seen].gather(-1, target[seen].expand(len(logits), -1)[..., None])[..., 0]
        total = total - (log_gates + own.sum(-1)).logsumexp(0)
        regularisers.append(losses)
    loss = total / (batch["labels"] != -100).sum()
    for name in ("orthogonality", "diversity", "sparsity"):
        loss = loss + getattr(config, f"{name}_weight") * torch.stack([r[name] for r in regularisers]).mean()
    return loss


def naive_logprobs(model, ids):
    """log p of the next token [n, V] after the thought and after each token behind it, of one row [L]."""
    log_gates, logits, _ = factor_logits(model, ids)
    logprobs = logits.log_softmax(-1)
    behind = ids[len(ids) - logits.shape[1] + 1 :]
    found = []
    for step in range(logits.shape[1]):
        read = logprobs[:, torch.arange(step), behind[:step]].sum(-1)
        weights = (log_gates + read).softmax(0)
        found.append((weights[:, None] * logprobs[:, step].exp()).sum(0).log())
    return torch.stack(found)


@torch.no_grad()
def factor_scores(model, inputs, sequences, scoring="full", allowed=None):
    """Log gates [B, K] and log p(item | thought_k) [B, K, C], a forward for every user, item and factor."""
    users = rows_of(inputs, "input_ids")
    allowed = torch.ones(len(sequences), dtype=torch.bool) if allowed is None else allowed
    allowed = allowed.expand(len(users), -1)
    masks = rows_of(inputs, "reasoner_mask") if "reasoner_mask" in inputs else [None] * len(users)
    gates, found = [], []
    for prompt, narrowed, may in zip(users, masks, allowed, strict=True):
        candidates = [s for s, ok in zip(sequences, may, strict=True) if ok]
        scores = []
        for sequence, ok in zip(sequences, may, strict=True):
            ids = torch.cat([prompt, torch.tensor([THOUGHT, *sequence])])
            log_gates, logits, _ = factor_logits(model, ids, narrowed)
            total = torch.full((len(logits),), 0.0 if ok else -torch.inf)
            for step, token in enumerate(sequence):
                siblings = sorted({s[step] for s in candidates if len(s) > step and s[:step] == sequence[:step]})
                own = logits[:, step].float()
                norm = own if scoring == "full" else own[:, siblings]
                total = total + own[:, token] - (norm.logsumexp(-1) if ok else 0)
            scores.append(total)
        gates.append(log_gates)
        found.append(torch.stack(scores, 1))
    return torch.stack(gates), torch.stack(found)


def item_scores(model, inputs, sequences, scoring="full", allowed=None):
    """The mixture's log-probabilities [B, C]."""
    gates, scores = factor_scores(model, inputs, sequences, scoring, allowed)
    return (gates[..., None] + scores).logsumexp(1)
