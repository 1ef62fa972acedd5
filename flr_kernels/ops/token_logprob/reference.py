"""Definition of token log-probabilities in plain PyTorch, and the same in blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import accumulation_dtype

#: Logits alive at a time in the reference backend: 2²⁴ float32 = 64 MiB.
CHUNK = 1 << 24
#: Logits kept for the backward at most: 2²⁶ float32 = 256 MiB, as much again while it runs. On a device more, where
#: computing them again costs most: a sixtieth of its memory, and at most four times as many.
KEPT = 1 << 26


def kept(hidden: Tensor) -> int:
    """Logits kept for the backward of ``hidden`` at most."""
    if not hidden.is_cuda:
        return KEPT
    memory = torch.cuda.get_device_properties(hidden.device).total_memory
    return max(KEPT, min(4 * KEPT, memory // 60 // 4))


def token_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log softmax(hidden · weightᵀ)[target], [M]."""
    acc = accumulation_dtype(hidden.dtype)
    logits = (hidden @ weight.T).to(acc)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def with_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [M], and logits [M, V] and normalisers [M] for :func:`backward_of_logits`."""
    logits = (hidden @ weight.T).to(accumulation_dtype(hidden.dtype))
    normaliser = logits.logsumexp(-1)
    return logits.gather(1, target[:, None])[:, 0] - normaliser, logits, normaliser


def logits_gradient(hidden: Tensor, target: Tensor, p: Tensor, grad: Tensor) -> Tensor:
    """Gradient [M, V] of logits, in the dtype of ``hidden``, from probabilities ``p``, which are overwritten."""
    d_logits = p.mul_(-grad[:, None])
    d_logits.scatter_add_(1, target[:, None], grad[:, None])
    return d_logits.to(hidden.dtype)


def row_blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Blocks of rows whose logits are at most ``CHUNK``, on a device four times as many."""
    step = max(1, (4 * CHUNK if hidden.is_cuda else CHUNK) // max(weight.shape[0], 1))
    return [slice(i, i + step) for i in range(0, hidden.shape[0], step)]


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    out = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    for rows in row_blocks(hidden, weight):
        out[rows] = token_logprob(hidden[rows], weight, target[rows])
    return out


def chunked_backward(
    hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor, needs_dh: bool, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape if needs_dh else (0,))
    d_weight = weight.new_zeros(weight.shape if needs_dw else (0,), dtype=grad.dtype)
    for rows in row_blocks(hidden, weight):
        p = (hidden[rows] @ weight.T).to(grad.dtype).softmax(-1)
        d_logits = logits_gradient(hidden[rows], target[rows], p, grad[rows])
        if needs_dh:
            d_hidden[rows] = d_logits @ weight
        if needs_dw:
            d_weight += d_logits.T @ hidden[rows]
    return d_hidden, d_weight.to(weight.dtype)
