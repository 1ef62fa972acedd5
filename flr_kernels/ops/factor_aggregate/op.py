"""Dynamic aggregation of K factor contributions into one thought, with its two regularisers, in one op.

    g = softmax(gate_logits)                              gates         [B, K]
    r = Σ_k g_k f_k                                       thought       [B, D]
    f̂_k = f_k / √(‖f_k‖² + ε²)
    mean over j ≠ k of (f̂_j · f̂_k)²                       orthogonality [B]     in [0, 1]; 0 for K = 1
    -Σ_k g_k log g_k                                      gate_entropy  [B]     nats, in [0, log K]

Backward, with P_jk = f̂_j · f̂_k (j ≠ k, 0 on the diagonal), n_k = √(‖f_k‖² + ε²), c = 4 dorth / (K (K - 1)):

    df̂_k = c Σ_j P_jk f̂_j,    df_k = g_k dr + (df̂_k - f̂_k (f̂_k · df̂_k)) / n_k
    dg_k = dgates_k + dr · f_k - dH (log g_k + 1),    dlogits_k = g_k (dg_k - Σ_j g_j dg_j)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ... import checks, dispatch
from ...backends import triton_config
from . import reference

#: Smallest and largest ε, whose squares float32 can hold.
EPS = 1e-18, 1e18


class FactorAggregate(NamedTuple):
    """Result of :func:`factor_aggregate`; all in the accumulation dtype (float32, or float64 for float64 input)."""

    thought: Tensor  # [B, D]
    gates: Tensor  # [B, K]
    orthogonality: Tensor  # [B]
    gate_entropy: Tensor  # [B]


def _triton_check(f: Tensor, *_) -> None:
    triton_config.check_device(f)
    triton_config.check_shape("f", f, f.shape[1])


_OP = dispatch.op("factor_aggregate")
_TRITON = f"{__package__}.triton_kernels"
_OP.register("reference", reference.factor_aggregate, reference.factor_aggregate_backward)
_OP.register("triton", dispatch.on_use(_TRITON, "forward"), dispatch.on_use(_TRITON, "backward"), _triton_check)


@dispatch.forward_op("factor_aggregate")
def _forward(f: Tensor, gate_logits: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, factors, size = f.shape
    return checks.empty_results(f, (batch, size), (batch, factors), (batch,), (batch,))


@dispatch.backward_op("factor_aggregate")
def _backward(
    f: Tensor, gates: Tensor, d_thought: Tensor, d_gates: Tensor, d_orth: Tensor, d_entropy: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return f.new_empty(f.shape), gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output):
    f, gate_logits, ctx.eps = inputs
    ctx.logits_dtype = gate_logits.dtype
    ctx.save_for_backward(f, output[1])


def _autograd(ctx, *grads):
    d_f, d_logits = _backward(*ctx.saved_tensors, *grads, ctx.eps)
    return d_f, d_logits.to(ctx.logits_dtype), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def factor_aggregate(f: Tensor, gate_logits: Tensor, eps: float = 1e-6) -> FactorAggregate:
    """Weigh K factor contributions by softmax gates and sum them.

    Args:
        f: factor contributions [B, K, D]; float32, float64, bfloat16 or float16.
        gate_logits: [B, K], divided by the temperature already; any floating dtype.
        eps: ε of the unit vectors in the orthogonality, in units of ‖f‖; choose it small beside the contributions'
            norm. A contribution much shorter than ε counts as orthogonal to the others.

    Returns:
        :class:`FactorAggregate`. Differentiable once in ``f`` and ``gate_logits``.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``eps`` is out of range. The triton backend also expects
            a contiguous last dimension of ``f``.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> f = torch.eye(3).expand(2, 3, 3)  # three orthogonal factors
        >>> out = factor_aggregate(f, torch.zeros(2, 3))
        >>> out.thought[0], out.orthogonality[0].item(), round(out.gate_entropy[0].exp().item(), 4)
        (tensor([0.3333, 0.3333, 0.3333]), 0.0, 3.0)
    """
    checks.tensor("f", f, "B K D")
    checks.tensor("gate_logits", gate_logits, "B K", beside=("f", f))
    checks.same("gate_logits", tuple(gate_logits.shape), tuple(f.shape[:2]), "(B, K) of f")
    return FactorAggregate(*_forward(f, gate_logits, checks.number("eps", eps, *EPS)))
