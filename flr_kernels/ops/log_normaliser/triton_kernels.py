"""Triton kernel of :func:`flr_kernels.log_normaliser`: an online log-sum-exp, every logit read once.

A program reads one of S parts of a row in blocks of ``BLOCK`` lanes (:func:`add_exponentials`, :func:`log_sum`). S > 1,
so that few rows fill the device: the parts' results are combined by the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import checks, reference
from ...backends import triton_config
from ...backends.triton_launch import add_exponentials, arch, launch, log_sum, precision

#: Programs of a multiprocessor that are worth starting; 4 warps with 16 loads a thread in flight each.
PROGRAMS = 4


@triton.jit(do_not_specialize=["V", "SPLITS"])
def forward_kernel(
    logits_ptr,  # [R, V]
    out_ptr,  # [R, S]
    row_stride,
    V,
    SPLITS,
    part,  # logits of a part, a multiple of BLOCK
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, split = program // SPLITS, program % SPLITS
    first = split * part
    last = tl.minimum(first + part, V)
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], -float("inf"), ACC)
    s = tl.zeros([BLOCK], ACC)
    for start in range(first, last, BLOCK):
        at = start + lanes
        x = tl.load(logits_ptr + row * row_stride + at, mask=at < last, other=-float("inf")).to(ACC)
        m, s = add_exponentials(m, s, x)
    tl.store(out_ptr + program, log_sum(m, s))


def _block() -> int:
    return 64 if triton_config.interpreted() else 2048


def forward(logits: Tensor) -> Tensor:
    """The reference's argument and result.

    Raises:
        ValueError: a last dimension that is not contiguous.
    """
    triton_config.check_rows("logits", logits)
    rows, vocabulary = logits.shape
    block = _block()
    splits = max(1, min(-(-vocabulary // (4 * block)), arch(logits).sms * PROGRAMS // max(rows, 1)))
    part = -(-vocabulary // (splits * block)) * block
    splits = -(-vocabulary // part)  # none is empty
    (out,) = checks.empty_results(logits, (rows, splits))
    launch(
        forward_kernel,
        rows * splits,
        {
            "logits_ptr": logits,
            "out_ptr": out,
            "row_stride": logits.stride(0),
            "V": vocabulary,
            "SPLITS": splits,
            "part": part,
        },
        {"BLOCK": block, "ACC": precision(logits.dtype)["ACC"]},
        num_warps=4,
    )
    return out[:, 0] if splits == 1 else reference.log_normaliser(out)
