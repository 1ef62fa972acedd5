"""What the Triton kernels share: the one place where Triton launches kernels, and dot products of mixed precision.

Importing this module needs triton; ``flr_kernels`` imports it on the first call that picks the triton backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .. import checks
from . import triton_config

#: Compiler options of every kernel. Fused multiply-add is asked for by name because its default changes in Triton 3.10.
OPTIONS = {"enable_fp_fusion": True}
_ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}

#: Whether kernels are for an AMD device; :mod:`flr_kernels.inspect` asks for both.
amd = torch.version.hip is not None

#: ``launcher(kernel, programs, arguments, constants, options)``; :mod:`flr_kernels.inspect` puts its compiler here. It
#: returns the compiled kernel, or None where there is none.
Launcher = Callable[[Any, int, dict[str, Any], dict[str, Any], dict[str, Any]], Any]


def _launch(kernel: Any, programs: int, arguments: dict, constants: dict, options: dict) -> Any:
    return kernel[(programs,)](**arguments, **constants, **options, **({} if triton_config.interpreted() else OPTIONS))


launcher: Launcher = _launch


def arch(device: torch.device) -> triton_config.Arch:
    """The architecture of a device; an H100's where there is none (interpreter)."""
    if device.type != "cuda":
        return triton_config.ARCHES[90]
    properties = torch.cuda.get_device_properties(device)
    return triton_config.arch_of((properties.major, properties.minor), properties.multi_processor_count)[1]


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a kernel: the accumulator type, whether dot operands are widened to it, and how products are taken.

    16-bit operands stay as they are for the tensor cores. The interpreter widens bfloat16, whose dot it gets wrong.
    Products of accumulators are nearly float32: by three products of tf32, or exactly where the operands are wide, and
    on AMD's matrix cores, which take float32.
    """
    acc = checks.accumulation_dtype(dtype)
    wide = dtype == acc or (dtype == torch.bfloat16 and triton_config.interpreted())
    return {"WIDE": wide, "FINE": "ieee" if wide or amd else "tf32x3", "ACC": _ACCUMULATORS[acc]}


@triton.jit
def add_exponentials(m, s, x):
    """Every lane's largest value and Σ exp(value - largest), with one more value ``x`` [BLOCK] each."""
    larger = tl.where(x > m, x, m)
    base = tl.where(larger == -float("inf"), 0.0, larger)  # -inf - -inf would be NaN
    return larger, s * tl.exp(m - base) + tl.exp(x - base)  # NaN and inf - inf stay NaN


@triton.jit
def log_sum(m, s):
    """The lanes of :func:`add_exponentials` together: log Σ exp of all values, in a fixed order."""
    top = tl.max(m, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    return base + tl.log(tl.sum(s * tl.exp(m - base), 0))


@triton.jit
def dot_inputs(a, b, acc, WIDE: tl.constexpr, ACC: tl.constexpr):
    """acc + a @ b, both in the input dtype (products of 16-bit numbers are exact in float32)."""
    if WIDE:
        return tl.dot(a.to(ACC), b.to(ACC), acc, input_precision="ieee", out_dtype=ACC)
    return tl.dot(a, b, acc)


@triton.jit
def dot_weights(w, x, acc, WIDE: tl.constexpr, ACC: tl.constexpr):
    """acc + w @ x for w in the accumulator dtype and x in the input dtype.

    With 16-bit x, w is split into a high and a low 16-bit part, so that it keeps 16 bits of mantissa or more: one
    rounding to bfloat16 would cost the pooled context two decimal digits. Rows are scaled to 1 first for float16,
    whose range gradients can leave.
    """
    if WIDE:
        return tl.dot(w, x.to(ACC), acc, input_precision="ieee", out_dtype=ACC)
    if x.dtype == tl.float16:
        largest = tl.max(tl.abs(w), 1)
        scale = tl.where(largest > 0, largest, 1.0)[:, None]
        w = w / scale
        high = w.to(tl.float16)
        low = (w - high.to(tl.float32)).to(tl.float16)
        return acc + scale * tl.dot(low, x, tl.dot(high, x))
    high = w.to(x.dtype)
    low = (w - high.to(tl.float32)).to(x.dtype)
    return tl.dot(low, x, tl.dot(high, x, acc))


@triton.jit
def dot_wide(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b, both in the accumulator dtype; ``tf32`` rounds to 11 bits, ``tf32x3`` is nearly float32, ``ieee`` is."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
