"""Host side of the Triton kernels of :func:`flr_kernels.factor_attention`: checks, workspace, launches.

A forward is one launch when a user's tokens fit one tile, else two (partial results, combination); a backward adds one
for Δ. No launch waits for the device and all sizes follow from shapes, so both can be captured in a CUDA graph.
Importing this module needs triton.
"""

from __future__ import annotations

from typing import Any

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
_RESULTS = ("context", "lse", "overlap", "entropy")
_PARTS = ("context", "max", "overlap", "entropy", "sum")


def _launch_tiles(
    kernel: Any, tile: triton_config.Tile, h: Tensor, u: Tensor, mask: Tensor | None, arguments: dict, constants: dict
) -> None:
    """A program a tile of a user's tokens, with what both directions take besides ``arguments`` and ``constants``."""
    batch, length, size = h.shape
    splits = triton.cdiv(length, tile.block_l)
    mask_stride_b, mask_stride_l = (0, 0) if mask is None else mask.stride()
    history = {
        "h_ptr": h,
        "u_ptr": u,
        "mask_ptr": (h.detach() if mask is None else mask).view(torch.uint8),
        "h_stride_b": h.stride(0),
        "h_stride_l": h.stride(1),
        "u_stride_b": u.stride(0),
        "u_stride_k": u.stride(1),
        "mask_stride_b": mask_stride_b,
        "mask_stride_l": mask_stride_l,
        "mask_length": 0 if mask is None else length,
        "length": length,
        "splits": splits,
        "D": size,
        "K": u.shape[1],
    }
    blocks = {"KP": triton_config.FACTOR_BLOCK, "BLOCK_L": tile.block_l, "BLOCK_D": tile.block_d, "CACHE": tile.cache}
    launch(
        kernel,
        batch * splits,
        {**history, **arguments},
        {**blocks, "SPLIT": splits > 1, **precision(h.dtype), **constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _launch_combination(kernel: Any, result: Tensor, splits: int, arguments: dict, constants: dict) -> None:
    """A program a row of ``result`` [B, K, D] and block of its columns."""
    batch, factors, size = result.shape
    block_d = triton_config.combine_block(size)
    launch(
        kernel,
        batch * factors * triton.cdiv(size, block_d),
        {**arguments, "splits": splits, "D": size, "K": factors},
        {"BLOCK_S": triton_config.COMBINE_ROWS, "BLOCK_D": block_d, **constants},
        num_warps=4,
    )


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
    tile = tile or triton_config.attention_tile(arch(h), batch, length, h.dtype, backward=False)
    splits = triton.cdiv(length, tile.block_l)

    def results(*parts: int) -> Saved:
        scalars = (batch, *parts, factors)
        return checks.empty_results(h, (*scalars, size), scalars, (*scalars, factors), scalars)

    out = results()
    part = results(splits) if splits > 1 else out
    total = torch.empty_like(part[1])
    arguments: dict[str, Any] = {f"{name}_ptr": x for name, x in zip(_PARTS, (*part, total), strict=True)}
    _launch_tiles(forward_kernel, tile, h, u, mask, {**arguments, "last": batch * splits - 1 if last_first else 0}, {})
    if splits > 1:
        arguments = {f"part_{name}": x for name, x in arguments.items()}
        arguments |= {f"{name}_ptr": x for name, x in zip(_RESULTS, out, strict=True)}
        constants = {"KP": triton_config.FACTOR_BLOCK, "ACC": precision(h.dtype)["ACC"]}
        _launch_combination(combine_kernel, out[0], splits, arguments, constants)
    return out


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
    tile = tile or triton_config.attention_tile(arch(h), batch, length, h.dtype, backward=True)
    splits = triton.cdiv(length, tile.block_l)
    wide, acc = (precision(h.dtype)[name] for name in ("WIDE", "ACC"))
    context, lse, overlap, entropy = (x.contiguous() for x in saved)
    d_context, d_lse, d_overlap, d_entropy = (x.contiguous() for x in grads)
    delta = torch.empty_like(lse)
    shared = {"d_context_ptr": d_context, "d_overlap_ptr": d_overlap, "d_entropy_ptr": d_entropy, "delta_ptr": delta}
    results = {"context_ptr": context, "overlap_ptr": overlap, "entropy_ptr": entropy, "d_lse_ptr": d_lse}
    launch(
        delta_kernel,
        batch * factors,
        {**shared, **results, "D": size, "K": factors},
        {"KP": triton_config.FACTOR_BLOCK, "BLOCK_D": 4 * triton_config.combine_block(size), "ACC": acc},
        num_warps=4,
    )
    dh = h.new_empty(h.shape if needs_dh else (0,))
    du = u.new_empty(u.shape)
    part = u.new_empty((batch, splits, factors, size), dtype=lse.dtype) if splits > 1 else du
    written = u.new_empty((batch, splits), dtype=torch.int32)
    arguments = {**shared, "lse_ptr": lse, "dh_ptr": dh, "du_ptr": part, "written_ptr": written}
    constants = {"NEEDS_DH": needs_dh, "DH_PRECISION": "ieee" if wide else _DH_PRECISION[h.dtype]}
    _launch_tiles(backward_kernel, tile, h, u, mask, arguments, constants)
    if splits > 1:
        arguments = {"part_ptr": part, "written_ptr": written, "du_ptr": du}
        _launch_combination(combine_du_kernel, du, splits, arguments, {"ACC": acc})
    return dh, du
