"""Triton kernel of :func:`flr_kernels.log_normaliser`: an online log-sum-exp, every logit read once.

A program reads one of S parts of a row in blocks. S > 1, so that few rows fill the device: the parts' results are
combined by the reference. A block is a table of ``VEC`` neighbouring logits, 16 bytes, which one thread loads at once
and weighs against one maximum: half the exponentials of a maximum a logit.

Rows need not begin at a multiple of 16 bytes (V = 50257): blocks are counted from the multiple before, so that their
addresses are, and what a row's first and last block hold of its neighbours is masked. Where the tensor itself does not
begin at one, Triton compiles narrow loads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import checks, reference
from ...backends import triton_config
from ...backends.triton_launch import arch, log_sum, precision
from ...backends.triton_plan import Plan, Spec, planned, spec

#: Programs of a multiprocessor that are worth starting: 4 warps with 4 loads of 16 bytes a thread in flight each.
PROGRAMS = 4


@triton.jit
def _add_blocks(logits, first, last, begin, end, m, s, BLOCK: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr):
    """Largest value and Σ exp(value - largest) of every row of the table, with the blocks from first to last added."""
    lanes = tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for start in range(first, last, BLOCK):
        at = start + lanes
        if MASKED:
            x = tl.load(logits + at, mask=(at >= begin) & (at < end), other=-float("inf")).to(m.dtype)
        else:
            x = tl.load(logits + at).to(m.dtype)
        larger = tl.maximum(m, tl.max(x, 1))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # -inf - -inf would be NaN
        # exp2 of differences, since exp minds results below 1e-38; NaN and inf - inf stay NaN
        added = tl.sum(tl.math.exp2((x - base[:, None]) * 1.4426950408889634), 1)
        s = s * tl.math.exp2((m - base) * 1.4426950408889634) + added
        m = larger
    return m, s


@triton.jit(do_not_specialize=["V", "splits"])
def forward_kernel(
    logits_ptr,  # [R, V]
    out_ptr,  # [R, S]
    row_stride,
    V,
    splits,
    part,  # logits of a part, a multiple of BLOCK
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    offset = row * row_stride
    begin = (offset % VEC).to(tl.int32)  # columns count from the multiple of VEC before the row
    logits = logits_ptr + offset // VEC * VEC
    end = begin + V
    first = (program % splits).to(tl.int32) * part
    last = tl.minimum(first + part, end)
    m = tl.full([BLOCK // VEC], -float("inf"), ACC)
    s = tl.zeros([BLOCK // VEC], ACC)
    # a row's beginning, if it is in this part, is in the first block
    whole = tl.where((begin > first) | (last - first < BLOCK), first + BLOCK, first)
    tail = whole + tl.maximum(last - whole, 0) // BLOCK * BLOCK
    m, s = _add_blocks(logits, first, whole, begin, end, m, s, BLOCK, VEC, True)
    m, s = _add_blocks(logits, whole, tail, begin, end, m, s, BLOCK, VEC, False)
    m, s = _add_blocks(logits, tail, last, begin, end, m, s, BLOCK, VEC, True)
    tl.store(out_ptr + program, log_sum(m, s))


def _block() -> int:
    return 64 if triton_config.interpreted() else 4096


@planned
def _plan(logits: Spec, programs: int) -> tuple[Plan, int]:
    triton_config.check_rows("logits", logits)
    rows, vocabulary = logits.shape
    block, vector = _block(), 16 // logits.dtype.itemsize
    columns = vocabulary + vector - 1  # the most that a row can touch
    splits = max(1, min(-(-columns // (4 * block)), arch(logits.device).sms * programs // max(rows, 1)))
    part = -(-columns // (splits * block)) * block
    splits = -(-columns // part)
    plan = Plan(logits.device, logits.dtype)
    out = plan.result((rows, splits), checks.accumulation_dtype(logits.dtype))
    plan.launch(
        forward_kernel,
        rows * splits,
        {
            "logits_ptr": plan.inputs[0],
            "out_ptr": out,
            "row_stride": logits.stride(0),
            "V": vocabulary,
            "splits": splits,
            "part": part,
        },
        {"BLOCK": block, "VEC": vector, "ACC": precision(logits.dtype)["ACC"]},
        num_warps=4,
    )
    return plan, splits


def forward(logits: Tensor) -> Tensor:
    """The reference's argument and result.

    Raises:
        ValueError: a last dimension that is not contiguous.
    """
    plan, splits = _plan(spec(logits), PROGRAMS)
    (out,) = plan.run(logits)
    return out[:, 0] if splits == 1 else reference.log_normaliser(out)
