"""log Σ_v exp x_rv of every row of logits, read once: what makes log-probabilities of the logits that are wanted.

    m_r = max_v x_rv,    n_r = m_r + log Σ_v exp(x_rv - m_r)

Decoding ranks by x_rt - n_r, so a [R, V] tensor of log-probabilities is never made. Inference only: no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks, dispatch
from ...backends import extension, triton_config
from . import reference


def _triton_check(logits: Tensor) -> None:
    triton_config.check_device(logits)
    triton_config.check_rows("logits", logits)
    if logits.dtype == torch.float64 and not triton_config.interpreted():
        raise ValueError("logits: the triton backend takes float64 under the interpreter only, got float64")


def _host_check(logits: Tensor) -> None:
    extension.check_host(logits)
    if logits.dtype != torch.float32:
        raise ValueError(f"logits: backend 'host' expects float32, got {logits.dtype}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"logits: backend 'host' expects a contiguous last dimension, got strides {logits.stride()}")


_OP = dispatch.op("log_normaliser")
_TRITON = f"{__package__}.triton_kernels"
_OP.register("reference", reference.blockwise)
_OP.register("triton", dispatch.on_use(_TRITON, "forward"), check=_triton_check)
_OP.register("host", extension.log_normaliser, check=_host_check, on_cpu=True)


@dispatch.forward_op("log_normaliser")
def _forward(logits: Tensor) -> Tensor:
    return checks.empty_results(logits, (len(logits),))[0]


def log_normaliser(logits: Tensor) -> Tensor:
    """Log of the sum of exponentials over the vocabulary.

    Args:
        logits: [R, V]; float32, float64, bfloat16 or float16, V >= 1. Triton: last dimension contiguous.

    Returns:
        [R] in the accumulation dtype (float32, or float64 for float64 input), without a gradient: a backward through it
        raises RuntimeError. Not finite where a row holds NaN or +inf,
        or is -inf throughout.

    Raises:
        ValueError: a shape or dtype does not fit.
        BackendUnavailable: ``FLR_BACKEND`` names a backend that cannot run here.

    Example:
        >>> import torch
        >>> log_normaliser(torch.zeros(2, 10)).exp()
        tensor([10., 10.])
    """
    checks.tensor("logits", logits, "R V")
    if logits.shape[1] == 0:
        raise ValueError("logits: expected V >= 1, got 0")
    return _forward(logits)
