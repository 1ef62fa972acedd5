"""Log-probability of one target token a row, without a large [M, V] tensor in memory.

    logp_m = w[target_m] · h_m - log Σ_v exp(w_v · h_m)
    dh_m   = dlogp_m (w[target_m] - Σ_v p_mv w_v),     dw_v = Σ_m dlogp_m (1[v = target_m] - p_mv) h_m

The backends walk over blocks of rows, so that at most ``CHUNK`` logits live at a time. If a gradient is wanted and
M · V is small (``kept``), all of them are kept for the backward; where there are more, and in compiled graphs, the
backward computes them again, a third of its work with a frozen weight. "reference" has logits in float32, "triton" in
the dtype of ``hidden``, each read once forward and once backward beside the products. Backend "cce" hands
a CUDA call to the library cut-cross-entropy (``pip install flr[cce]``), which keeps logits on chip; it runs only when
asked for (``FLR_BACKEND=token_logprob=cce``). Why: docs/log.md.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch
from ...backends import triton_config
from . import reference


def _cce(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # exact: no gradient left out for being small, sums compensated
    return -linear_cross_entropy(hidden, weight, target, reduction="none", impl="cce_exact").float()


def _cce_check(hidden: Tensor, *_: Any) -> None:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        raise dispatch.BackendUnavailable("backend 'cce' needs the package cut-cross-entropy: pip install 'flr[cce]'")
    if not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device) < (8, 0):
        raise dispatch.BackendUnavailable("backend 'cce' needs a CUDA device of compute capability 8.0 or newer")
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"hidden: backend 'cce' expects bfloat16 or float16, got {hidden.dtype}")


def _triton_check(hidden: Tensor, *_: Any) -> None:
    triton_config.check_device(hidden)
    if hidden.dtype == torch.float64 and not triton_config.interpreted():
        raise ValueError("hidden: the triton backend takes float64 under the interpreter only, got float64")


def _check_targets(weight: Tensor, target: Tensor) -> None:
    if target.device.type == "cpu" and len(target):
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= len(weight):
            raise IndexError(f"target: expected 0 to {len(weight) - 1}, got {low if low < 0 else high}")


def _reference(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    _check_targets(weight, target)
    return reference.chunked(hidden, weight, target)


_OP = dispatch.op("token_logprob")
_TRITON = f"{__package__}.triton_kernels"
_triton = {x: dispatch.on_use(_TRITON, x) for x in ("forward", "backward", "with_logits", "logits_gradient")}
_OP.register("reference", _reference, reference.chunked_backward)
_OP.register("triton", _triton["forward"], _triton["backward"], _triton_check)
_OP.register("cce", _cce, reference.chunked_backward, _cce_check)  # backward: in compiled graphs


@dispatch.forward_op("token_logprob")
def _forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=checks.accumulation_dtype(hidden.dtype))


@dispatch.backward_op("token_logprob")
def _backward(
    hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor, needs_dh: bool, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape if needs_dh else (0,))
    return d_hidden, weight.new_empty(weight.shape if needs_dw else (0,))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    needs_dh, needs_dw, _ = ctx.needs_input_grad
    d_hidden, d_weight = _backward(*ctx.saved_tensors, grad, needs_dh, needs_dw)
    return d_hidden if needs_dh else None, d_weight if needs_dw else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _KeepsLogits(torch.autograd.Function):
    """Few logits: forward and backward share them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
        make = _triton["with_logits"] if backend == "triton" else reference.with_logits
        with torch.autocast(hidden.device.type, enabled=False):
            _check_targets(weight, target)
            out, logits, normaliser = make(hidden, weight, target)
        ctx.save_for_backward(hidden, weight, target, logits, normaliser)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, target, logits, normaliser = ctx.saved_tensors
        needs_dh, needs_dw = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph: the operator refuses to be differentiated, these lines would not
            dh, dw = _backward(hidden, weight, target, grad, needs_dh, needs_dw)
            return dh if needs_dh else None, dw if needs_dw else None, None, None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.backend == "triton":
                d_logits = _triton["logits_gradient"](logits, normaliser, target, grad)
            else:  # not in place: the graph may be kept for another backward
                d_logits = reference.logits_gradient(hidden, target, (logits - normaliser[:, None]).exp_(), grad)
            dh = d_logits @ weight if needs_dh else None
            return dh, d_logits.T @ hidden if needs_dw else None, None, None


def _keeps_logits(hidden: Tensor, weight: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return wanted and len(hidden) * len(weight) <= reference.kept(hidden)


def _gathered(weight: Tensor) -> Tensor:
    """A DTensor as the whole tensor it stands for; its gradient is summed over the mesh and scattered back."""
    tensor = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor exists
    if tensor is None or not isinstance(weight, tensor.DTensor):
        return weight
    return weight.full_tensor(grad_placements=[tensor.Partial()] * weight.device_mesh.ndim)


def token_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log-probability of ``target`` under softmax(hidden · weightᵀ), one a row.

    Args:
        hidden: [M, D]; float32, float64, bfloat16 or float16. M = 0 is allowed.
        weight: lm_head weight [V, D], dtype and device of ``hidden``. A DTensor (FSDP2) is gathered for the call; every
            process of its mesh must make it, with rows of its own, and the gradient is the sum over processes. Inside a
            sharded module's forward the weight is whole already; :func:`flr.model.head.head_logprob` goes that way.
        target: int64 [M], in [0, V).

    Returns:
        [M] in the accumulation dtype, in (-inf, 0]. Differentiable once in ``hidden`` and ``weight``.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: a target is out of range, on the CPU. On a GPU looking would be a wait: there the reference backend
            ends in a device-side assertion, and cce must not be given such a target.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> token_logprob(torch.zeros(2, 4), torch.randn(10, 4), torch.tensor([3, 7])).exp()
        tensor([0.1000, 0.1000])
    """
    checks.tensor("hidden", hidden, "M D")
    checks.tensor("weight", weight, "V D", dtypes=(hidden.dtype,), beside=("hidden", hidden))
    checks.tensor("target", target, "M", dtypes=(torch.int64,), beside=("hidden", hidden))
    checks.same("weight", weight.shape[1], hidden.shape[1], "D of hidden")
    checks.same("target", target.shape[0], hidden.shape[0], "M of hidden")
    weight = _gathered(weight)
    if not torch.compiler.is_compiling():
        backend = dispatch.select("token_logprob", hidden, weight, target)
        if backend == "cce":
            return _cce(hidden, weight, target)  # with the library's own backward
        if _keeps_logits(hidden, weight):
            return _KeepsLogits.apply(hidden, weight, target, backend)
    return _forward(hidden, weight, target)
