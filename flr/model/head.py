"""A model's own lm_head: logits, losses and log-probabilities of target tokens, wherever its weight lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, softplus
from torch.utils.checkpoint import checkpoint

from flr.config import IGNORE
from flr_kernels import token_logprob
from flr_kernels.ops.log_normaliser.reference import CACHED_CELLS

from .own_forward import own_logits
from .token_table import TokenTable, is_unhooked, table_of

#: Logits kept for the backward of the loss; above it, they are recomputed a block of rows at a time.
MAX_LOSS_LOGITS = 1 << 26
#: What makes logits more than hidden · weightᵀ (see :func:`head`).
_SCALES = (
    "logit_scale",
    "logits_scaling",
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)
#: A number that is gathered and multiplied costs as much as this many multiply-adds of a matrix product: on a CPU
#: measured; on a GPU expected from 30 bytes at 3 TB/s against float32 products at 60 TFLOP/s.
_GATHER_COST = {"cpu": 40, "cuda": 300}
_HALF = (torch.bfloat16, torch.float16)


def is_linear(model: Any) -> bool:
    """Whether logits are the scaled product of states and lm_head; else the model's own forward makes them."""
    patch = model.__dict__.get("_flr_patch")
    return patch is None or patch.traits is None or patch.traits.linear_head


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states [..., D], as the model's own forward computes them."""
    return scaled_head(model, hidden) if is_linear(model) else own_logits(model, hidden)


def scaled_head(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states [..., D]: the lm_head's product, and what the config says of scales and caps."""
    return scale_logits(model, model.get_output_embeddings()(hidden))


def scale_logits(model: Any, logits: Tensor) -> Tensor:
    """What follows the lm_head in ``model``, element by element."""
    config = model.config.get_text_config(decoder=True)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scale
    for name in _SCALES[2:]:  # Gemma, RecurrentGemma, xLSTM
        if (cap := getattr(config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


def row_losses(model: Any, hidden: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy [M] of hidden [M, D] against target [M]; 0 where the target is -100."""

    def block(h: Tensor, t: Tensor) -> Tensor:
        logits = head(model, h).float() if h.dtype != torch.float64 else head(model, h)
        return cross_entropy(logits, t, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)

    return _in_blocks(model, block, hidden, target)


def several_logprobs(model: Any, hidden: Tensor, tokens: Tensor, among: Tensor | None = None) -> Tensor:
    """Log-probabilities [M, n] of n tokens (int64 [M, n]) after hidden [M, D], over the vocabulary or ``among`` some.

    In blocks of rows that are recomputed in the backward where logits are many.
    """

    def block(h: Tensor, t: Tensor) -> Tensor:
        logits = head(model, h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = (logits if among is None else logits[:, among]).logsumexp(-1, keepdim=True)
        return logits.gather(1, t) - total

    return _in_blocks(model, block, hidden, tokens)


def _in_blocks(model: Any, block: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, rows: Tensor) -> Tensor:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    if hidden.shape[0] * vocab <= MAX_LOSS_LOGITS:
        return block(hidden, rows)
    step = max(1, MAX_LOSS_LOGITS // (4 * vocab))
    parts = [
        checkpoint(block, hidden[i : i + step], rows[i : i + step], use_reentrant=False)
        for i in range(0, hidden.shape[0], step)
    ]
    return torch.cat(parts)


def is_unscaled(model: Any) -> bool:
    """Whether the model's logits are those of its lm_head, as they are."""
    config = model.config.get_text_config(decoder=True)
    return is_linear(model) and all(getattr(config, name, None) is None for name in _SCALES)


def is_plain(model: Any, head: nn.Module) -> bool:
    """Whether the model's logits are exactly hidden · weightᵀ, computed by ``nn.Linear`` itself."""
    return (
        is_unscaled(model)
        and isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)  # accelerate's hooks
        and head.bias is None
        and head.weight.is_floating_point()  # not a quantised store
    )


def head_logprob(model: Any, hidden: Tensor, target: Tensor) -> Tensor:
    """Log-probability of ``target`` under the model's own head, without [M, V] logits in memory.

    A plain linear head goes to :func:`flr_kernels.token_logprob`, and so does one whose last rows an adapter trains; a
    bias, a scale, a softcap, another adapter or a quantised weight to the head itself, in blocks of rows that are
    recomputed in the backward.

    The computation takes the place of the head's ``forward``, so whatever hooks surround that run: FSDP2 gathers the
    weight before and reduce-scatters its gradient after, as for any layer (likewise DeepSpeed ZeRO-3, whose hooks are
    on the same call). Call it in the forward of the wrapped module. Outside, an FSDP2 weight is
    gathered for the call and its gradient is the sum over processes, not FSDP's mean.

    Args:
        model: a causal LM; its config says how logits are made of the head's output.
        hidden: [M, D], last layer, after the final norm. Under autocast, matrix products run in its dtype.
        target: int64 [M], in [0, V).

    Returns:
        [M], float32 (float64 for float64 input). Differentiable once in ``hidden`` and the head's parameters.

    Raises:
        ValueError: a shape or dtype does not fit.

    Example:
        >>> import torch, transformers
        >>> config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> head_logprob(model, torch.zeros(2, 4), torch.tensor([3, 7])).exp()
        tensor([0.0909, 0.0909], grad_fn=<ExpBackward0>)
    """
    head = model.get_output_embeddings()
    if not is_plain(model, head):
        table = table_of(head) if is_unscaled(model) and is_unhooked(head) else None
        if table is None or table.trained is None or not table.at_end:
            return -row_losses(model, hidden, target, 0.0)
        base = table.weight[: -len(table.trained)]
        return _in_two_parts(base, table.trained.to(base.dtype), hidden, target)

    def forward(x: Tensor) -> Tensor:
        return token_logprob(*_as_products(x, head.weight), target)

    if torch.compiler.is_compiling() and is_unhooked(head):
        return forward(hidden)
    return _called(head, forward, hidden)


def _as_products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of autocast, where that is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype)


def _in_two_parts(base: Tensor, trained: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities [M] of tokens under the rows of base [V - N, D] and trained [N, D], one after the other.

    With p_A(t) = exp(x_t - Z_A) over the rows of part A alone, and B the other part,

        log p(t) = log p_A(t) - log(1 + exp(Z_B - Z_A)),   Z_A = x_t - log p_A(t) for any t of A
    """
    own = target >= len(base)
    logprobs, normalisers = [], []
    for weight, token in ((base, target.masked_fill(own, 0)), (trained, (target - len(base)).clamp_min(0))):
        x, rows = _as_products(hidden, weight)
        logprobs.append(token_logprob(x, rows, token))
        logit = (hidden.to(logprobs[-1].dtype) * embedding(token, weight).to(logprobs[-1].dtype)).sum(-1)
        normalisers.append(logit - logprobs[-1])
    apart = normalisers[1] - normalisers[0]
    return torch.where(own, logprobs[1] - softplus(-apart), logprobs[0] - softplus(apart))


@torch.compiler.disable  # which does not follow a forward that comes and goes
def _called(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``forward(x)`` as a call of ``module``, hooks and all."""
    module.forward = forward
    try:
        return module(x)
    finally:
        del module.forward


def _is_rounded(logits: Tensor) -> bool:
    """Whether float32 logits are half-precision ones, as accelerate returns what autocast has computed."""
    return any(torch.equal(logits, logits.to(dtype).float()) for dtype in _HALF)


class HeadRows:
    """Logits of chosen tokens from hidden states, in float32, reading the chosen rows of lm_head alone.

    Made by ``of``, which says None where the lm_head is not an ordinary matrix in memory (quantised, sharded, adapted
    but for rows of its own).
    """

    def __init__(self, lm: Any, table: TokenTable | None = None) -> None:
        table = table or table_of(lm.get_output_embeddings())
        if table is None:
            raise ValueError("lm: expected an lm_head whose rows can be read one by one, got another")
        self.lm, self.table = lm, table

    @classmethod
    def of(cls, lm: Any, hidden: Tensor, logits: Tensor) -> HeadRows | None:
        """Rows of ``lm``, if they give the ``logits`` [B, V] that it computed itself from ``hidden`` [B, D]."""
        table = table_of(lm.get_output_embeddings()) if is_linear(lm) else None
        if table is None or table.weight.shape != (logits.shape[-1], hidden.shape[-1]):
            return None
        rows = cls(lm, table)
        count, vocabulary = logits.shape
        token = torch.arange(0, vocabulary, max(1, vocabulary // 16), device=logits.device).repeat(count)
        row = torch.arange(count, device=logits.device).repeat_interleave(len(token) // max(count, 1))
        theirs = logits[row, token].float()
        error = (rows(hidden, row, token) - theirs).abs().amax()
        share = 1e-2 if _is_rounded(theirs) else 1e-4
        return rows if bool(error <= share * theirs.abs().amax().clamp_min(1e-6)) else None

    def __call__(self, hidden: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """Logit of ``token`` int64 [n] after the state ``row`` int64 [n] of hidden [R, D], float32 [n].

        As a product with all different tokens where that is cheaper than a dot product for each.
        """
        hidden = hidden.float()
        if len(token):
            different, column = token.unique(return_inverse=True)
            if len(hidden) * len(different) < _GATHER_COST.get(hidden.device.type, 40) * len(token):
                logits = hidden @ self.table.rows(different).float().T
                return self.finish(logits[row, column], token)
        cells = CACHED_CELLS if hidden.device.type == "cpu" else 1 << 26
        blocks = (x.split(max(1, cells // hidden.shape[1])) for x in (row, token))
        parts = [(hidden[r] * self.table.rows(t).float()).sum(-1) for r, t in zip(*blocks, strict=True)]
        return self.finish(torch.cat(parts) if parts else hidden.new_empty(0), token)

    def over(self, token: Tensor) -> TokenRows:
        """The rows of the tokens int64 [U], copied once."""
        return TokenRows(self, self.table.rows(token), token)

    def finish(self, logits: Tensor, token: Tensor) -> Tensor:
        if self.table.bias is not None:
            logits = logits + self.table.bias[token].float()
        return scale_logits(self.lm, logits)


class TokenRows:
    """From hidden [..., D] to the logits of some tokens, float32 [..., U], by one product in the model's dtype."""

    def __init__(self, head_rows: HeadRows, weight: Tensor, token: Tensor) -> None:
        self.head_rows, self.weight, self.token = head_rows, weight, token

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.head_rows.finish(torch.nn.functional.linear(hidden, self.weight).float(), self.token)
