"""In which numbers a model is held and computed: float32 where weights are trained, the checkpoint's own elsewhere.

An optimizer's step is small beside the weight that it is added to. In bfloat16, which has 8 bits of precision, most of
them are rounded away; in float16 they under- and overflow. So what is trained is float32, products may be rounded
(``--bf16``, autocast), and what is not trained may be held as small as it came.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from flr.config import DTYPES

logger = logging.getLogger("flr")


def dtype_to_load(dtype: str, trained: bool, use_cpu: bool = False) -> str:
    """What a backbone's weights are loaded in.

    Args:
        dtype: one of :data:`flr.config.DTYPES`. "auto" is float32 for weights that are trained, and for all on a CPU,
            where bfloat16 pays on some kinds only; a frozen backbone on a GPU keeps the checkpoint's own.
        trained: whether these weights are trained, and not adapters or a reasoner beside them.
        use_cpu: the machine's GPU is not used.

    Raises:
        ValueError: float16 weights to train.

    Example:
        >>> dtype_to_load("auto", trained=True), dtype_to_load("bfloat16", trained=False)
        ('float32', 'bfloat16')
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "float16" and trained:
        wanted = "float32 or bfloat16 for weights that are trained (float16 fits --lora_rank and --freeze_backbone)"
        raise ValueError(f"dtype: expected {wanted}, got 'float16'")
    if dtype == "bfloat16" and trained:
        logger.warning("dtype bfloat16: most steps of trained weights are rounded away; --bf16 true computes in it")
    if dtype != "auto":
        return dtype
    return "float32" if trained or use_cpu or not torch.cuda.is_available() else "auto"


def raise_trained(model: nn.Module) -> nn.Module:
    """``model``, whose trained weights of less precision than float32 are float32 now, in place.

    For adapters, rows of tokens and reasoners on a backbone of any dtype.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model


def choose_autocast(args: Any) -> None:
    """Compute in bfloat16 beside float32 weights, unless the arguments say otherwise, where a GPU does that at speed.

    Args:
        args: a ``TrainingArguments``, changed in place; its ``bf16`` is None where nobody has chosen.
    """
    chosen = args.bf16 is not None or args.fp16 or args.use_cpu or bool(args.deepspeed)
    if chosen or not torch.cuda.is_available() or not torch.cuda.is_bf16_supported(including_emulation=False):
        return
    args.bf16 = True
    if hasattr(args, "mixed_precision"):
        args.mixed_precision = "bf16"
    else:  # transformers before 5.2 tells accelerate so
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def trained_parameters(model: nn.Module) -> str:
    """One line on what is trained, in which dtypes: counts of reasoner, adapters, rows of tokens, backbone.

    Example:
        >>> from torch import nn
        >>> trained_parameters(nn.Linear(3, 2))
        'training 8 of 8 parameters (100.00 %): backbone 8 in float32'
    """
    counts: dict[tuple[str, str], int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes holds two weights in a byte
        size = parameter.numel() if state is None else int(torch.Size(state.shape).numel())
        total += size
        if parameter.requires_grad:
            key = (_part(f".{name}"), str(parameter.dtype).removeprefix("torch."))
            counts[key] = counts.get(key, 0) + size
    parts = ", ".join(f"{part} {size:,} in {dtype}" for (part, dtype), size in counts.items())
    trained = sum(counts.values())
    share = 100 * trained / max(total, 1)
    return f"training {trained:,} of {total:,} parameters ({share:.2f} %): {parts or 'none'}"


def _part(name: str) -> str:
    if ".flr." in name:
        return "reasoner"
    if ".trainable_tokens_delta." in name:
        return "rows of tokens"
    return "adapters" if ".lora_" in name else "backbone"
