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
from ...backends import triton_config, triton_launch
from ...backends.triton_launch import arch, precision
from ...backends.triton_plan import Memory, Plan, Spec, planned, spec
from .reference import Saved
from .triton_kernels import backward_kernel, combine_du_kernel, combine_kernel, delta_kernel, forward_kernel

#: A bfloat16 result keeps 8 bits, so operands of 11 bits do; float16 keeps 11 and needs more.
_DH_PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32x3"}
_RESULTS = ("context", "lse", "overlap", "entropy")
_PARTS = ("context", "max", "overlap", "entropy", "sum")


def _launch_tiles(
    plan: Plan, kernel: Any, tile: triton_config.Tile, specs: tuple[Spec, ...], arguments: dict, constants: dict
) -> None:
    """A program a tile of a user's tokens, with what both directions take besides ``arguments`` and ``constants``."""
    h, u, *masks = specs
    batch, length, size = h.shape
    splits = triton.cdiv(length, tile.block_l)
    mask_stride_b, mask_stride_l = masks[0].strides if masks else (0, 0)
    history = {
        "h_ptr": plan.inputs[0],
        "u_ptr": plan.inputs[1],
        "mask_ptr": plan.inputs[2 if masks else 0].viewed(torch.uint8),
        "h_stride_b": h.stride(0),
        "h_stride_l": h.stride(1),
        "u_stride_b": u.stride(0),
        "u_stride_k": u.stride(1),
        "mask_stride_b": mask_stride_b,
        "mask_stride_l": mask_stride_l,
        "mask_length": length if masks else 0,
        "length": length,
        "splits": splits,
        "D": size,
        "K": u.shape[1],
    }
    blocks = {"KP": triton_config.FACTOR_BLOCK, "BLOCK_L": tile.block_l, "BLOCK_D": tile.block_d, "CACHE": tile.cache}
    plan.launch(
        kernel,
        batch * splits,
        {**history, **arguments},
        {**blocks, "SPLIT": splits > 1, **precision(h.dtype), **constants},
        num_warps=tile.num_warps,
        num_stages=triton_config.stages(tile, h.dtype.itemsize, triton_launch.amd),
    )


def _launch_combination(plan: Plan, kernel: Any, u: Spec, splits: int, arguments: dict, constants: dict) -> None:
    """A program a row of a result [B, K, D] and block of its columns."""
    batch, factors, size = u.shape
    block_d = triton_config.combine_block(size)
    plan.launch(
        kernel,
        batch * factors * triton.cdiv(size, block_d),
        {**arguments, "splits": splits, "D": size, "K": factors},
        {"BLOCK_S": triton_config.COMBINE_ROWS, "BLOCK_D": block_d, **constants},
        num_warps=4,
    )


def _tile(h: Spec, u: Spec, tile: triton_config.Tile | None, backward: bool) -> tuple[triton_config.Tile, int]:
    """The tile, chosen if none is given, and how many of them a user's tokens need."""
    triton_config.check_shape("h", h, u.shape[1])
    triton_config.check_rows("h", h)
    triton_config.check_rows("u", u)
    if tile is None:
        tile = triton_config.attention_tile(arch(h.device), h.shape[0], h.shape[1], h.dtype, backward=backward)
    return tile, triton.cdiv(h.shape[1], tile.block_l)


@planned
def _forward_plan(last_first: bool, tile: triton_config.Tile | None, h: Spec, u: Spec, *mask: Spec) -> Plan:
    tile, splits = _tile(h, u, tile, backward=False)
    batch, factors, size = u.shape
    acc = checks.accumulation_dtype(h.dtype)
    plan = Plan(h.device, *(x.dtype for x in (h, u, *mask)))

    def shapes(*parts: int) -> tuple[tuple[int, ...], ...]:
        scalars = (batch, *parts, factors)
        return (*scalars, size), scalars, (*scalars, factors), scalars

    out = [plan.result(shape, acc) for shape in shapes()]
    part = [plan.working(shape, acc) for shape in shapes(splits)] if splits > 1 else out
    total = plan.working(shapes(splits)[1], acc) if splits > 1 else out[1]  # not written with one split
    arguments: dict[str, Any] = {f"{name}_ptr": x for name, x in zip(_PARTS, (*part, total), strict=True)}
    last = batch * splits - 1 if last_first else 0
    _launch_tiles(plan, forward_kernel, tile, (h, u, *mask), {**arguments, "last": last}, {})
    if splits > 1:
        arguments = {f"part_{name}": x for name, x in arguments.items()}
        arguments |= {f"{name}_ptr": x for name, x in zip(_RESULTS, out, strict=True)}
        constants = {"KP": triton_config.FACTOR_BLOCK, "ACC": precision(h.dtype)["ACC"]}
        _launch_combination(plan, combine_kernel, u, splits, arguments, constants)
    return plan


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
    if mask is None:
        return _forward_plan(last_first, tile, spec(h), spec(u)).run(h, u)
    return _forward_plan(last_first, tile, spec(h), spec(u), spec(mask)).run(h, u, mask)


def _launch_delta(plan: Plan, u: Spec, arguments: dict, acc: Any) -> None:
    """A program a user and factor."""
    batch, factors, size = u.shape
    plan.launch(
        delta_kernel,
        batch * factors,
        {**arguments, "D": size, "K": factors},
        {"KP": triton_config.FACTOR_BLOCK, "BLOCK_D": 4 * triton_config.combine_block(size), "ACC": acc},
        num_warps=4,
    )


@planned
def _backward_plan(needs_dh: bool, tile: triton_config.Tile | None, h: Spec, u: Spec, *mask: Spec) -> Plan:
    """For contiguous results and gradients of the accumulation dtype, which follow the inputs."""
    tile, splits = _tile(h, u, tile, backward=True)
    batch, factors, size = u.shape
    acc = checks.accumulation_dtype(h.dtype)
    fine, kernel_acc = (precision(h.dtype)[name] for name in ("FINE", "ACC"))
    names = (*_RESULTS, *(f"d_{name}" for name in _RESULTS))
    plan = Plan(h.device, *(x.dtype for x in (h, u, *mask)), *[acc] * len(names))
    saved = {f"{name}_ptr": x for name, x in zip(names, plan.inputs[-len(names) :], strict=True)}
    dh = plan.result(h.shape if needs_dh else (0,), h.dtype)
    du = plan.result(u.shape, u.dtype)
    delta = plan.working((batch, factors), acc)
    part = plan.working((batch, splits, factors, size), acc) if splits > 1 else du
    written = plan.working((batch, splits), torch.int32)

    def of(*wanted: str) -> dict[str, Memory]:
        return {name: saved[name] for name in wanted}

    shared = {**of("d_context_ptr", "d_overlap_ptr", "d_entropy_ptr"), "delta_ptr": delta}
    _launch_delta(plan, u, {**shared, **of("context_ptr", "overlap_ptr", "entropy_ptr", "d_lse_ptr")}, kernel_acc)
    arguments = {**shared, **of("lse_ptr"), "dh_ptr": dh, "du_ptr": part, "written_ptr": written}
    constants = {"NEEDS_DH": needs_dh, "DH_PRECISION": "ieee" if fine == "ieee" else _DH_PRECISION[h.dtype]}
    _launch_tiles(plan, backward_kernel, tile, (h, u, *mask), arguments, constants)
    if splits > 1:
        arguments = {"part_ptr": part, "written_ptr": written, "du_ptr": du}
        _launch_combination(plan, combine_du_kernel, u, splits, arguments, {"ACC": kernel_acc})
    return plan


def backward(
    h: Tensor, u: Tensor, mask: Tensor | None, saved: Saved, grads: Saved, needs_dh: bool,
    *, tile: triton_config.Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dh [B, L, D] (empty when not needed) and du [B, K, D]: the reference's arguments, results and errors as forward.

    The [B, K, ·] tensors are small beside H, so those that autograd expanded are copied to contiguous memory.
    """
    inputs = (h, u) if mask is None else (h, u, mask)
    plan = _backward_plan(needs_dh, tile, *map(spec, inputs))
    return plan.run(*inputs, *[x.contiguous() for x in (*saved, *grads)])
