"""Triton kernels of :func:`flr_kernels.factor_aggregate`: one launch forward, one backward, one program a user.

The formulas and symbols are those of ``op.py``, with P and n from the Gram matrix f_j · f_k. In the backward the unit
vectors are written out, so that one K x K matrix A holds everything that the orthogonality sends back:

    A_kj = c P_kj / (n_k n_j)  for j ≠ k,     A_kk = -c Σ_j P_kj² / n_k²,     df_k = g_k dr + Σ_j A_kj f_j

Shapes: ``KP`` = K padded to 16 rows, ``BLOCK_D`` columns a step. K·D numbers are few: a program reads them from device
memory once and then, K + 1 times, from the caches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import checks
from ...backends import triton_config, triton_launch
from ...backends.triton_launch import dot_wide, precision
from ...backends.triton_plan import Plan, Spec, planned, spec


@triton.jit
def _gram(f_rows, row_stride, eps, K, D, k, KP: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """The Gram matrix, a column at a time from the caches (each warp would repeat a product over D), and 1 / n."""
    columns = tl.arange(0, BLOCK_D)
    gram = tl.zeros([KP, KP], ACC)
    for j in range(K):
        products = tl.zeros([KP, BLOCK_D], ACC)
        for start in range(0, D, BLOCK_D):
            d = start + columns
            inside = (k < K)[:, None] & (d < D)[None, :]
            f = tl.load(f_rows + k.to(tl.int64)[:, None] * row_stride + d[None, :], mask=inside, other=0.0)
            f_j = tl.load(f_rows + tl.cast(j, tl.int64) * row_stride + d, mask=d < D, other=0.0)
            products += f.to(ACC) * f_j.to(ACC)[None, :]
        gram = tl.where(k[None, :] == j, tl.sum(products, 1)[:, None], gram)
    squares = tl.sum(tl.where(k[:, None] == k[None, :], gram, 0.0), 1)
    return gram, tl.rsqrt(squares + eps * eps)


@triton.jit(do_not_specialize=["K"])
def forward_kernel(
    f_ptr,  # [B, K, D]
    logits_ptr,  # [B, K]
    thought_ptr,  # [B, D]
    gates_ptr,  # [B, K]
    orthogonality_ptr,  # [B]
    entropy_ptr,  # [B]
    f_stride_b,
    f_stride_k,
    logits_stride_b,
    logits_stride_k,
    eps,
    D,
    K,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    columns = tl.arange(0, BLOCK_D)
    real = k < K
    logits = tl.load(logits_ptr + b * logits_stride_b + k * logits_stride_k, mask=real, other=-float("inf")).to(ACC)
    shifted = logits - tl.max(logits, 0)
    total = tl.sum(tl.exp(shifted), 0)
    gates = tl.exp(shifted) / total
    entropy = -tl.sum(tl.where(gates > 0, gates * (shifted - tl.log(total)), 0.0), 0)
    f_rows = f_ptr + b * f_stride_b
    for start in range(0, D, BLOCK_D):
        d = start + columns
        at = k.to(tl.int64)[:, None] * f_stride_k + d[None, :]
        f = tl.load(f_rows + at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(ACC)
        tl.store(thought_ptr + b * D + d, tl.sum(gates[:, None] * f, 0), mask=d < D)
    gram, inverse = _gram(f_rows, f_stride_k, eps, K, D, k, KP, BLOCK_D, ACC)
    cosines = tl.where(k[:, None] == k[None, :], 0.0, gram * inverse[:, None] * inverse[None, :])
    pairs = tl.maximum(K * (K - 1), 1).to(ACC)
    tl.store(gates_ptr + b * K + k, gates, mask=real)
    tl.store(orthogonality_ptr + b, tl.sum(tl.sum(cosines * cosines, 1), 0) / pairs)
    tl.store(entropy_ptr + b, entropy)


@triton.jit(do_not_specialize=["K"])
def backward_kernel(
    f_ptr,  # [B, K, D]
    gates_ptr,  # [B, K]
    d_thought_ptr,  # [B, D]
    d_gates_ptr,  # [B, K]
    d_orthogonality_ptr,  # [B]
    d_entropy_ptr,  # [B]
    df_ptr,  # [B, K, D]
    d_logits_ptr,  # [B, K]
    f_stride_b,
    f_stride_k,
    eps,
    D,
    K,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    columns = tl.arange(0, BLOCK_D)
    real = k < K
    f_rows = f_ptr + b * f_stride_b
    gates = tl.load(gates_ptr + b * K + k, mask=real, other=0.0)
    products = tl.zeros([KP, BLOCK_D], ACC)
    for start in range(0, D, BLOCK_D):
        d = start + columns
        at = k.to(tl.int64)[:, None] * f_stride_k + d[None, :]
        f = tl.load(f_rows + at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(ACC)
        products += f * tl.load(d_thought_ptr + b * D + d, mask=d < D, other=0.0)[None, :]

    d_gates = tl.load(d_gates_ptr + b * K + k, mask=real, other=0.0) + tl.sum(products, 1)
    log_gates = tl.log(tl.maximum(gates, 1.2e-38))  # the smallest normal float32; a gate of 0 gets no gradient
    d_gates -= tl.load(d_entropy_ptr + b) * (log_gates + 1.0)
    d_logits = gates * (d_gates - tl.sum(gates * d_gates, 0))
    tl.store(d_logits_ptr + b * K + k, d_logits, mask=real)

    gram, inverse = _gram(f_rows, f_stride_k, eps, K, D, k, KP, BLOCK_D, ACC)
    scale = inverse[:, None] * inverse[None, :]
    same = k[:, None] == k[None, :]
    cosines = tl.where(same, 0.0, gram * scale)
    own = tl.sum(cosines * cosines, 1)
    factor = 4.0 * tl.load(d_orthogonality_ptr + b) / tl.maximum(K * (K - 1), 1).to(ACC)
    mixing = factor * scale * tl.where(same, -own[:, None], cosines)
    for start in range(0, D, BLOCK_D):
        d = start + columns
        inside = real[:, None] & (d < D)[None, :]
        f = tl.load(f_rows + k.to(tl.int64)[:, None] * f_stride_k + d[None, :], mask=inside, other=0.0).to(ACC)
        d_thought = tl.load(d_thought_ptr + b * D + d, mask=d < D, other=0.0)
        df = gates[:, None] * d_thought[None, :] + dot_wide(mixing, f, PRECISION, ACC)
        tl.store(df_ptr + (b * K + k)[:, None] * D + d[None, :], df, mask=inside)


def _launch(plan: Plan, kernel: Any, f: Spec, eps: float, arguments: dict[str, Any], constants: dict[str, Any]) -> None:
    """A program a user, with what both kernels take besides ``arguments`` and ``constants``."""
    batch, factors, size = f.shape
    strides = {"f_stride_b": f.stride(0), "f_stride_k": f.stride(1)}
    both = {"f_ptr": plan.inputs[0], **strides, "eps": eps, "D": size, "K": factors}
    blocks = {"KP": triton_config.FACTOR_BLOCK, "BLOCK_D": triton_config.aggregate_block()}
    constants = {**blocks, "ACC": precision(f.dtype)["ACC"], **constants}
    plan.launch(kernel, batch, {**both, **arguments}, constants, num_warps=4)


def _plan(f: Spec, *dtypes: torch.dtype) -> Plan:
    triton_config.check_shape("f", f, f.shape[1])
    triton_config.check_rows("f", f)
    return Plan(f.device, f.dtype, *dtypes)


@planned
def _forward_plan(f: Spec, gate_logits: Spec, eps: float) -> Plan:
    plan = _plan(f, gate_logits.dtype)
    batch, factors, size = f.shape
    acc = checks.accumulation_dtype(f.dtype)
    shapes = {"thought": (batch, size), "gates": (batch, factors), "orthogonality": (batch,), "entropy": (batch,)}
    arguments = {
        "logits_ptr": plan.inputs[1],
        **{f"{name}_ptr": plan.result(shape, acc) for name, shape in shapes.items()},
        "logits_stride_b": gate_logits.stride(0),
        "logits_stride_k": gate_logits.stride(1),
    }
    _launch(plan, forward_kernel, f, eps, arguments, {})
    return plan


def forward(f: Tensor, gate_logits: Tensor, eps: float) -> tuple[Tensor, ...]:
    """thought [B, D], gates [B, K], orthogonality [B], gate_entropy [B]: the reference's arguments and results.

    Raises:
        ValueError: D, K or dtype outside of the kernels' range, or a last dimension of ``f`` that is not contiguous.
    """
    return _forward_plan(spec(f), spec(gate_logits), eps).run(f, gate_logits)


@planned
def _backward_plan(f: Spec, eps: float) -> Plan:
    """For contiguous gates and gradients of the accumulation dtype."""
    acc = checks.accumulation_dtype(f.dtype)
    names = ("gates_ptr", "d_thought_ptr", "d_gates_ptr", "d_orthogonality_ptr", "d_entropy_ptr")
    plan = _plan(f, *[acc] * len(names))
    arguments = {
        **dict(zip(names, plan.inputs[1:], strict=True)),
        "df_ptr": plan.result(f.shape, f.dtype),
        "d_logits_ptr": plan.result(f.shape[:2], acc),
    }
    # K products a number, on the tensor cores at nearly float32 precision
    constants = {"PRECISION": "ieee" if f.dtype == torch.float64 or triton_launch.amd else "tf32x3"}
    _launch(plan, backward_kernel, f, eps, arguments, constants)
    return plan


def backward(
    f: Tensor, gates: Tensor, d_thought: Tensor, d_gates: Tensor, d_orth: Tensor, d_entropy: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """df [B, K, D] and dlogits [B, K]: the reference's arguments, results and errors as forward.

    The incoming gradients are small, so those that autograd expanded are copied to contiguous memory.
    """
    small = [x.contiguous() for x in (gates, d_thought, d_gates, d_orth, d_entropy)]
    return _backward_plan(spec(f), eps).run(f, *small)
