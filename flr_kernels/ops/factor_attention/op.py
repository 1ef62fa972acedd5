"""K-factor attention over a history, with what its regularisers need, in one op.

    s_kl = u_k · h_l                                    absorbed query: no key projection of the L tokens
    α_kl = softmax over valid l of s_kl
    c_k  = Σ_l α_kl h_l            context  [B, K, D]   pooled on raw H: no value projection
    lse_k = log Σ_l exp s_kl       lse      [B, K]
    O_jk = Σ_l α_jl α_kl           overlap  [B, K, K]   diversity is a function of it
    E_k  = -Σ_l α_kl log α_kl      entropy  [B, K]      nats

Backward, with S = dO + dOᵀ, from saved [B, K, ·] tensors and one more read of H:

    dp_kl = dc_k · h_l + Σ_j S_kj α_jl - dE_k log α_kl
    Δ_k   = dc_k · c_k + Σ_j S_kj O_kj + dE_k E_k - dlse_k
    ds_kl = α_kl (dp_kl - Δ_k)
    dh_l  = Σ_k α_kl dc_k + ds_kl u_k,   du_k = Σ_l ds_kl h_l
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch
from ...backends import triton_config
from . import cuda_host, reference


class FactorAttention(NamedTuple):
    """Result of :func:`factor_attention`; all in the accumulation dtype (float32, or float64 for float64 input)."""

    context: Tensor  # [B, K, D]
    lse: Tensor  # [B, K]
    overlap: Tensor  # [B, K, K]
    entropy: Tensor  # [B, K]


def _triton_check(h: Tensor, u: Tensor, *_) -> None:
    triton_config.check_device(h)
    triton_config.check_shape("h", h, u.shape[1])


def _reference_forward(h: Tensor, u: Tensor, mask: Tensor | None, last_first: bool = False):
    return reference.factor_attention(h, u, mask, reference.pooled_with_a_look)


def _grouped(backward: Callable) -> Callable:
    """The backward of a backend, called with the flat arguments of the operator."""
    return lambda h, u, mask, *rest: backward(h, u, mask, rest[:4], rest[4:8], rest[8])


_OP = dispatch.op("factor_attention")
_TRITON = f"{__package__}.triton_host"
_TRITON_BACKWARD = _grouped(dispatch.on_use(_TRITON, "backward"))
_OP.register("reference", _reference_forward, _grouped(reference.factor_attention_backward))
_OP.register("triton", dispatch.on_use(_TRITON, "forward"), _TRITON_BACKWARD, _triton_check)
_OP.register("cuda", cuda_host.forward, _grouped(cuda_host.backward), cuda_host.check, suits=cuda_host.fills)


@dispatch.forward_op("factor_attention")
def _forward(
    h: Tensor, u: Tensor, mask: Tensor | None, last_first: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, factors, size = u.shape
    scalars = (batch, factors)
    return checks.empty_results(h, (*scalars, size), scalars, (*scalars, factors), scalars)


@dispatch.backward_op("factor_attention")
def _backward(
    h: Tensor, u: Tensor, mask: Tensor | None, context: Tensor, lse: Tensor, overlap: Tensor, entropy: Tensor,
    d_context: Tensor, d_lse: Tensor, d_overlap: Tensor, d_entropy: Tensor, needs_dh: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return h.new_empty(h.shape if needs_dh else (0,)), u.new_empty(u.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)


def _autograd(ctx, *grads):
    dh, du = _backward(*ctx.saved_tensors, *grads, ctx.needs_input_grad[0])
    return (dh if ctx.needs_input_grad[0] else None), du, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def factor_attention(h: Tensor, u: Tensor, mask: Tensor | None = None, *, last_first: bool = False) -> FactorAttention:
    """Attend from K factor queries to the tokens of every user, in one pass over ``h``.

    Args:
        h: hidden states [B, L, D]; float32, float64, bfloat16 or float16; last dimension contiguous; L >= 1.
        u: absorbed factor queries [B, K, D], the scale 1/√F included; dtype and device of ``h``.
        mask: bool [B, L], true where a token may be attended to; None for all. A user whose mask is all false gets
            context, overlap and entropy 0, lse -inf and zero gradients.
        last_first: walk over the users from the last to the first. The results do not change;
            a second call on a history larger than the GPU's L2 then starts with the part that is still in it.

    Returns:
        :class:`FactorAttention`. Nothing of size B·K·L is kept for the backward. Differentiable once in ``h``, ``u``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names argument, expected and actual. The triton
            backend also expects contiguous last dimensions of ``h`` and ``u``.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> h, u = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
        >>> out = factor_attention(h, u, mask=torch.tensor([[True] * 5, [False] * 4 + [True]]))
        >>> out.context.shape, torch.allclose(out.context[1, 0], h[1, 4]), out.entropy[1, 0].item() == 0
        (torch.Size([2, 3, 8]), True, True)
    """
    checks.tensor("h", h, "B L D")
    checks.tensor("u", u, "B K D", dtypes=(h.dtype,), beside=("h", h))
    (batch, length, size), (users, _, columns) = h.shape, u.shape
    checks.same("u", (users, columns), (batch, size), "(B, D) of h")
    if length == 0:
        raise ValueError(f"h: expected at least one token (L >= 1), got shape {tuple(h.shape)}")
    if mask is not None:
        checks.tensor("mask", mask, "B L", dtypes=(torch.bool,), beside=("h", h))
        checks.same("mask", (*mask.shape,), (batch, length), "(B, L) of h")
    checks.flag("last_first", last_first)
    return FactorAttention(*_forward(h, u, mask, last_first))
