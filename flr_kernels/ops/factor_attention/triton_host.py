"""Host side of the Triton kernels of :func:`flr_kernels.factor_attention`: checks, workspace, launches.

A forward is one launch when a user's tokens fit one tile, else two (partial results, combination); a backward adds one
for Δ. No launch waits for the device and all sizes follow from shapes, so both can be captured in a CUDA graph.
Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ... import checks
from ...backends import triton_config
from ...backends.triton_launch import arch, launch, precision
from .reference import Saved
from .triton_kernels import backward_kernel, combine_du_kernel, combine_kernel, delta_kernel, forward_kernel

#: A bfloat16 result keeps 8 bits, so operands of 11 bits do; float16 keeps 11 and needs more.
_DH_PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32x3"}


def _mask_arguments(h: Tensor, mask: Tensor | None) -> dict[str, Tensor | int]:
    if mask is None:
        return {"mask_ptr": h.detach().view(torch.uint8), "mask_stride_b": 0, "mask_stride_l": 0, "mask_length": 0}
    stride_b, stride_l = mask.stride()
    return {
        "mask_ptr": mask.view(torch.uint8),
        "mask_stride_b": stride_b,
        "mask_stride_l": stride_l,
        "mask_length": h.shape[1],
    }


def _history_arguments(h: Tensor, u: Tensor, mask: Tensor | None, splits: int) -> dict[str, Tensor | int]:
    return {
        "h_ptr": h,
        "u_ptr": u,
        "h_stride_b": h.stride(0),
        "h_stride_l": h.stride(1),
        "u_stride_b": u.stride(0),
        "u_stride_k": u.stride(1),
        "length": h.shape[1],
        "splits": splits,
        "D": h.shape[2],
        "K": u.shape[1],
        **_mask_arguments(h, mask),
    }


def _check(h: Tensor, u: Tensor) -> None:
    triton_config.check_shape("h", h, u.shape[1])
    triton_config.check_rows("h", h)
    triton_config.check_rows("u", u)


def forward(
    h: Tensor, u: Tensor, mask: Tensor | None, last_first: bool = False, *, tile: triton_config.Tile | None = None
) -> Saved:
    """context [B, K, D], lse [B, K], overlap [B, K, K], entropy [B, K]: the reference's arguments and results.

    ``last_first`` walks over the users from the last to the first; results are the same to the bit.

    ``tile`` overrides the choice of ``triton_config.attention_tile``, for tuning and inspection.

    Raises:
        ValueError: D, K or dtype outside of the kernels' range, or a last dimension of ``h`` or ``u`` that is not
            contiguous. Other strides, and all strides of ``mask``, are free.
    """
    _check(h, u)
    batch, length, size = h.shape
    factors = u.shape[1]
    acc = checks.accumulation_dtype(h.dtype)
    tile = tile or triton_config.attention_tile(arch(h), batch, length, size, factors, h.dtype, backward=False)
    splits = triton.cdiv(length, tile.block_l)

    def results(*parts: int) -> dict[str, Tensor]:
        return {
            "context": h.new_empty((batch, *parts, factors, size), dtype=acc),
            "max": h.new_empty((batch, *parts, factors), dtype=acc),
            "overlap": h.new_empty((batch, *parts, factors, factors), dtype=acc),
            "entropy": h.new_empty((batch, *parts, factors), dtype=acc),
        }

    out = results()
    part = results(splits) if splits > 1 else out
    total = torch.empty_like(part["max"])
    launch(
        forward_kernel,
        batch * splits,
        {
            **_history_arguments(h, u, mask, splits),
            "last": batch * splits - 1 if last_first else 0,
            **{f"{name}_ptr": tensor for name, tensor in part.items()},
            "sum_ptr": total,
        },
        {
            "KP": triton_config.FACTOR_BLOCK,
            "BLOCK_L": tile.block_l,
            "BLOCK_D": tile.block_d,
            "CACHE": tile.cache,
            "SPLIT": splits > 1,
            **precision(h.dtype),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _combine(part, total, out, splits)
    return out["context"], out["max"], out["overlap"], out["entropy"]


def _combine(part: dict[str, Tensor], total: Tensor, out: dict[str, Tensor], splits: int) -> None:
    """Put the results of the splits together."""
    batch, factors, size = out["context"].shape
    block_d = triton_config.combine_block(size)
    launch(
        combine_kernel,
        batch * factors * triton.cdiv(size, block_d),
        {
            **{f"part_{name}_ptr": tensor for name, tensor in part.items()},
            **{f"{'lse' if name == 'max' else name}_ptr": tensor for name, tensor in out.items()},
            "part_sum_ptr": total,
            "splits": splits,
            "D": size,
            "K": factors,
        },
        {
            "KP": triton_config.FACTOR_BLOCK,
            "BLOCK_S": triton_config.COMBINE_ROWS,
            "BLOCK_D": block_d,
            "ACC": precision(total.dtype)["ACC"],
        },
        num_warps=4,
    )


def backward(
    h: Tensor, u: Tensor, mask: Tensor | None, saved: Saved, grads: Saved, needs_dh: bool,
    *, tile: triton_config.Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dh [B, L, D] (empty when not needed) and du [B, K, D]: the reference's arguments, results and errors as forward.

    The [B, K, ·] tensors are small beside H, so those that autograd expanded are copied to contiguous memory.
    """
    _check(h, u)
    batch, length, size = h.shape
    factors = u.shape[1]
    tile = tile or triton_config.attention_tile(arch(h), batch, length, size, factors, h.dtype, backward=True)
    splits = triton.cdiv(length, tile.block_l)
    constants = precision(h.dtype)
    context, lse, overlap, entropy = (x.contiguous() for x in saved)
    d_context, d_lse, d_overlap, d_entropy = (x.contiguous() for x in grads)
    delta = _delta(context, overlap, entropy, d_context, d_overlap, d_entropy, d_lse)
    dh = h.new_empty(h.shape if needs_dh else (0,))
    du = u.new_empty(u.shape)
    part = u.new_empty((batch, splits, factors, size), dtype=lse.dtype) if splits > 1 else du
    written = u.new_empty((batch, splits), dtype=torch.int32)
    launch(
        backward_kernel,
        batch * splits,
        {
            **_history_arguments(h, u, mask, splits),
            "lse_ptr": lse,
            "delta_ptr": delta,
            "d_context_ptr": d_context,
            "d_overlap_ptr": d_overlap,
            "d_entropy_ptr": d_entropy,
            "dh_ptr": dh,
            "du_ptr": part,
            "written_ptr": written,
        },
        {
            "KP": triton_config.FACTOR_BLOCK,
            "BLOCK_L": tile.block_l,
            "BLOCK_D": tile.block_d,
            "CACHE": tile.cache,
            "SPLIT": splits > 1,
            "NEEDS_DH": needs_dh,
            "DH_PRECISION": "ieee" if constants["WIDE"] else _DH_PRECISION[h.dtype],
            **constants,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        block_d = triton_config.combine_block(size)
        launch(
            combine_du_kernel,
            batch * factors * triton.cdiv(size, block_d),
            {"part_ptr": part, "written_ptr": written, "du_ptr": du, "splits": splits, "D": size, "K": factors},
            {"BLOCK_S": triton_config.COMBINE_ROWS, "BLOCK_D": block_d, "ACC": constants["ACC"]},
            num_warps=4,
        )
    return dh, du


def _delta(
    context: Tensor, overlap: Tensor, entropy: Tensor, d_context: Tensor, d_overlap: Tensor, d_entropy: Tensor,
    d_lse: Tensor,
) -> Tensor:  # fmt: skip
    """Δ [B, K]."""
    batch, factors, size = context.shape
    delta = torch.empty_like(d_lse)
    tensors = {"context": context, "overlap": overlap, "entropy": entropy}
    gradients = {"d_context": d_context, "d_overlap": d_overlap, "d_entropy": d_entropy, "d_lse": d_lse}
    launch(
        delta_kernel,
        batch * factors,
        {**{f"{name}_ptr": x for name, x in {**tensors, **gradients, "delta": delta}.items()}, "D": size, "K": factors},
        {
            "KP": triton_config.FACTOR_BLOCK,
            "BLOCK_D": 4 * triton_config.combine_block(size),
            "ACC": precision(d_lse.dtype)["ACC"],
        },
        num_warps=4,
    )
    return delta
