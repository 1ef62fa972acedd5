"""Triton on either side of the product with the lm_head: logits stay in the model's dtype, and are read once.

    forward    n_m = log Σ_v exp x_mv (:func:`flr_kernels.log_normaliser`),  logp_m = x_{m, target_m} - n_m
    backward   dx_mv = dlogp_m (1[v = target_m] - exp(x_mv - n_m)), one pass over the logits

The products are PyTorch's. A row's block is a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends import triton_config
from ...backends.triton_plan import Plan, Spec, planned, spec
from ..log_normaliser import triton_kernels as log_normaliser
from . import reference


@triton.jit
def gradient_kernel(
    logits_ptr,  # [M, V]
    normaliser_ptr,  # [M]
    target_ptr,  # [M]
    grad_ptr,  # [M]
    out_ptr,  # [M, V], may be logits
    V,
    parts,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    column = (program % parts).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    normaliser = tl.load(normaliser_ptr + row)
    x = tl.load(logits_ptr + row * V + column, mask=inside, other=-float("inf")).to(normaliser.dtype)
    p = tl.math.exp2((x - normaliser) * 1.4426950408889634)
    is_target = column == tl.load(target_ptr + row).to(tl.int32)
    dx = tl.load(grad_ptr + row) * (tl.where(is_target, 1.0, 0.0) - p)
    tl.store(out_ptr + row * V + column, dx.to(out_ptr.dtype.element_ty), mask=inside)


@planned
def _plan(logits: Spec, *dtypes: torch.dtype) -> Plan:
    rows, vocabulary = logits.shape
    block = 64 if triton_config.interpreted() else 4096
    parts = -(-vocabulary // block)
    plan = Plan(logits.device, logits.dtype, *dtypes)
    out = plan.result((rows, vocabulary), logits.dtype)
    names = ("logits_ptr", "normaliser_ptr", "target_ptr", "grad_ptr")
    arguments = {**dict(zip(names, plan.inputs, strict=True)), "out_ptr": out, "V": vocabulary, "parts": parts}
    plan.launch(gradient_kernel, rows * parts, arguments, {"BLOCK": block}, num_warps=4)
    return plan


def logits_gradient(logits: Tensor, normaliser: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """Gradient of logits [M, V], contiguous and in their dtype, for ``grad`` [M] of the log-probabilities."""
    tensors = (logits, normaliser, target.contiguous(), grad.contiguous())
    (out,) = _plan(spec(logits), *(x.dtype for x in tensors[1:])).run(*tensors)
    return out


def with_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's; logits are in the dtype of ``hidden``."""
    logits = hidden @ weight.T
    normaliser = log_normaliser.forward(logits)
    return logits.gather(1, target[:, None])[:, 0].to(normaliser.dtype) - normaliser, logits, normaliser


def forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The reference's arguments and result, a block of rows at a time."""
    parts = [with_logits(hidden[x], weight, target[x])[0] for x in reference.row_blocks(hidden, weight)]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)


def backward(
    hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor, needs_dh: bool, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    """The reference's arguments and result; logits are computed again."""
    d_hidden = hidden.new_empty(hidden.shape if needs_dh else (0,))
    d_weight = weight.new_zeros(weight.shape if needs_dw else (0,), dtype=grad.dtype)
    for x in reference.row_blocks(hidden, weight):
        _, logits, normaliser = with_logits(hidden[x], weight, target[x])
        d_logits = logits_gradient(logits, normaliser, target[x], grad[x])
        if needs_dh:
            d_hidden[x] = d_logits @ weight
        if needs_dw:
            d_weight += d_logits.T @ hidden[x]
    return d_hidden, d_weight.to(weight.dtype)
