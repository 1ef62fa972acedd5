"""Log-probabilities of target tokens through a model's own lm_head, wherever its weight lives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flr_kernels import token_logprob

from .forward import _row_losses

#: What makes logits more than hidden · weightᵀ (see :func:`flr.model.head.head`).
_SCALES = ("logit_scale", "logits_scaling", "final_logit_softcapping")


def _is_plain(model: Any, head: nn.Module) -> bool:
    """Whether the model's logits are exactly hidden · weightᵀ, computed by ``nn.Linear`` itself."""
    config = model.config.get_text_config()
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)  # accelerate's hooks
        and head.bias is None
        and head.weight.is_floating_point()  # not a quantised store
        and all(getattr(config, name, None) is None for name in _SCALES)
    )


def head_logprob(model: Any, hidden: Tensor, target: Tensor) -> Tensor:
    """Log-probability of ``target`` under the model's own head, without [M, V] logits in memory.

    A plain linear head goes to :func:`flr_kernels.token_logprob`; a bias, a scale, a softcap, an adapter or a quantised
    weight to the head itself, in blocks of rows that are recomputed in the backward.

    The computation takes the place of the head's ``forward``, so whatever hooks surround that run: FSDP2 gathers the
    weight before and reduce-scatters its gradient after, as for any layer (likewise DeepSpeed ZeRO-3, whose hooks are
    on the same call; not tested here). Call it in the forward of the wrapped module. Outside, an FSDP2 weight is gathered for
    the call and its gradient is the sum over processes, not FSDP's mean.

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
    if not _is_plain(model, head):
        return -_row_losses(model, hidden, target, 0.0)

    def forward(x: Tensor) -> Tensor:
        weight = head.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return token_logprob(x, weight, target)

    head.forward = forward
    try:
        return head(hidden)
    finally:
        del head.forward
