"""Host side of the CUDA kernels of :func:`flr_kernels.factor_attention` (csrc/factor_attention.cuh, _backward.cuh).

Each direction is one launch that reads every valid token once, for compute capability 9.0. The backward is for
bfloat16, K to 4 and D a multiple of 16; others are Triton's, or the reference's where triton is not.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...backends import extension, triton_config
from ...dispatch import BackendUnavailable
from . import reference
from .reference import Saved

#: csrc/factor_attention.h has the same. D from Triton's least, whose backward this is.
MAX_FACTORS, MIN_SIZE, MAX_SIZE, SIZE_STEP = 16, triton_config.MIN_SIZE, 8192, 8
#: What of that the backward takes.
GRADIENT_FACTORS, GRADIENT_STEP = 4, 16
#: What of it has run on a device, and so is ``auto``'s choice.
MEASURED_FACTORS, MEASURED_SIZE = 8, 4096
_DTYPES = (torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def check(h: Tensor, u: Tensor, *_: Any) -> None:
    """Raise unless the kernel serves the device, dtype, shape and strides of these arguments.

    Raises:
        BackendUnavailable: no CUDA device of compute capability 9.0, or an extension without the kernel.
        ValueError: another dtype, a D that is no multiple of 8 from 32 to 8192, K above 16, or rows of ``h`` or ``u``
            that are not contiguous and at multiples of 16 bytes.
    """
    extension.check_cuda(h)
    if problem := extension.attention_problem(h.device.index):
        raise BackendUnavailable(problem)
    size, factors = h.shape[2], u.shape[1]
    if h.dtype not in _DTYPES:
        raise ValueError(f"h: expected bfloat16 or float16 for backend 'cuda', got {h.dtype}")
    if not MIN_SIZE <= size <= MAX_SIZE or size % SIZE_STEP:
        raise ValueError(
            f"h: expected D a multiple of {SIZE_STEP} from {MIN_SIZE} to {MAX_SIZE} for backend 'cuda', got D = {size}"
        )
    if not 1 <= factors <= MAX_FACTORS:
        raise ValueError(f"u: expected K from 1 to {MAX_FACTORS} for backend 'cuda', got K = {factors}")
    _check_rows("h", h)
    _check_rows("u", u)


def _check_rows(name: str, x: Tensor) -> None:
    outer, row, column = x.stride()
    if column != 1 or (outer | row) % SIZE_STEP or x.data_ptr() % 16:
        raise ValueError(
            f"{name}: expected contiguous rows at multiples of 16 bytes for backend 'cuda', got strides {x.stride()} "
            f"at address {x.data_ptr():#x}"
        )


def fills(h: Tensor, u: Tensor, *_: Any) -> bool:
    """Whether ``auto`` chooses this: the shape's kernel has run on a device, and users are enough, or short enough.

    No more than a cluster of multiprocessors serves a user. Measured on an H200: one user of 4,096 tokens takes 90 µs
    here and 45 with Triton, whose tiles go anywhere; four users of 2,048 take 28.
    """
    measured = u.shape[1] <= MEASURED_FACTORS and h.shape[2] <= MEASURED_SIZE
    return measured and (h.shape[0] >= 4 or h.shape[1] <= 512)


def forward(h: Tensor, u: Tensor, mask: Tensor | None, last_first: bool = False) -> Saved:
    """As the reference, for what :func:`check` lets pass; ``last_first`` changes the order of the users alone."""
    batch, factors, size = u.shape
    scalars = (batch, factors)
    context, lse, overlap, entropy = checks.empty_results(h, (*scalars, size), scalars, (*scalars, factors), scalars)
    extension.call("factor_attention", h, h, u, mask, context, lse, overlap, entropy, last_first)
    return context, lse, overlap, entropy


def has_backward(h: Tensor, u: Tensor) -> bool:
    """Whether the CUDA kernel's backward takes what its forward took."""
    return h.dtype == torch.bfloat16 and u.shape[1] <= GRADIENT_FACTORS and h.shape[2] % GRADIENT_STEP == 0


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def backward(
    h: Tensor, u: Tensor, mask: Tensor | None, saved: Saved, grads: Saved, needs_dh: bool
) -> tuple[Tensor, Tensor]:
    """dh [B, L, D] (empty when not needed) and du [B, K, D]: the reference's arguments and results."""
    if has_backward(h, u):
        dh, du = h.new_empty(h.shape if needs_dh else (0,)), u.new_empty(u.shape)
        rows = (tuple(map(_aligned, saved)), tuple(map(_aligned, grads)))
        extension.call("factor_attention_backward", h, h, u, mask, *rows, dh if needs_dh else None, du)
        return dh, du
    if _HAS_TRITON:
        from . import triton_host

        return triton_host.backward(h, u, mask, saved, grads, needs_dh)
    return reference.factor_attention_backward(h, u, mask, saved, grads, needs_dh)
