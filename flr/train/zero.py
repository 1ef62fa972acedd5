"""DeepSpeed's ZeRO: what of its configuration is honoured, and weights brought together.

Stage 2 shards gradients and the optimizer, stage 3 the weights too. What was not compared with one process is refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
#: What the arguments say, and the configuration may repeat. DeepSpeed would clip at 1 where nothing is said.
_OF_ARGUMENTS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip
_REPORTS = ("steps_per_print", "wall_clock_breakdown")
_ZERO = (
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save",
)  # fmt: skip
#: Arguments that were not compared, or cannot be with shards.
_EXCLUDED = ("fsdp", "bf16", "fp16", "torch_compile", "gradient_checkpointing", "activation_checkpointing")


def zero_settings(args: Any) -> dict[str, Any] | None:
    """The configuration that ``args.deepspeed`` (a dict, JSON or the name of a JSON file) stands for; None for none.

    Raises:
        ValueError: a part of it, or of the arguments, is not one that was compared with one process; or DeepSpeed or
            its launcher is missing.
    """
    if args.deepspeed is None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
            raise ValueError("deepspeed: expected a file of DeepSpeed's as --deepspeed, got accelerate's configuration")
        return None
    config = _read(args.deepspeed)
    zero: Any = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (2, 3):
        raise ValueError(f"deepspeed: expected zero_optimization.stage 2 or 3, got {stage!r}")
    for place, given, known in (("", config, ("zero_optimization", *_OF_ARGUMENTS, *_REPORTS)),
                                ("zero_optimization.", zero, _ZERO)):  # fmt: skip
        if odd := [name for name in given if name not in known]:
            wanted = f"of {place}* what was compared with one process ({', '.join(known)})"
            raise ValueError(f"deepspeed: expected {wanted}, got {place}{odd[0]}")
    for name in _EXCLUDED:
        if value := getattr(args, name, None):
            raise ValueError(f"deepspeed: expected none with {name} {value}, got ZeRO-{stage}")
    optim = getattr(args.optim, "value", args.optim)
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim: expected one of {', '.join(OPTIMIZERS)} with deepspeed, got {optim!r}")
    if stage == 3 and args.prompt_cache != "none":
        wanted = "none with ZeRO-3, whose processes gather weights at the same times"
        raise ValueError(f"prompt_cache: expected {wanted}, got {args.prompt_cache!r}")
    _check_installed()
    own = {"zero_optimization": {**zero, "stage3_gather_16bit_weights_on_model_save": stage == 3}}
    return {**dict.fromkeys(_OF_ARGUMENTS, "auto"), **config, **own}


def _read(given: Any) -> dict[str, Any]:
    wanted = "deepspeed: expected a JSON object, or the name of a file with one"
    if isinstance(given, str):
        text = given
        try:
            if not given.lstrip().startswith("{"):
                text = Path(given).read_text()
            given = json.loads(text)
        except (OSError, ValueError) as error:
            raise ValueError(f"{wanted}, got {error}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"{wanted}, got {type(given).__name__}")
    return dict(given)


def _check_installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("deepspeed: expected the package deepspeed, got none; pip install deepspeed")
    if "RANK" not in os.environ:
        raise ValueError("deepspeed: expected processes of a launcher (torchrun), got one without RANK")


def load_whole() -> None:
    """Models are loaded whole in every process from here on: they get a reasoner, tokens, adapters before shards."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def shards_weights(args: Any) -> bool:
    """Whether a training with these arguments leaves a part of each weight in a process (ZeRO-3)."""
    return bool(args.deepspeed) and args.deepspeed["zero_optimization"]["stage"] == 3


def check_dtypes(model: nn.Module) -> None:
    """ValueError where weights are not float32: DeepSpeed computes in one dtype and casts the others."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"deepspeed: expected float32 weights (--dtype float32), got {parameter.dtype} in {name}")


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict of a model of which each process has a part, on the CPU; tied weights are one tensor.

    Args:
        model: every process calls this.
        keep: of this process; where it is False the result is empty.
    """
    copies: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in copies:
            with _gathered(value):
                copies[id(value)] = value.detach().to("cpu", copy=True) if keep else value.detach()[:0]
        found[name] = copies[id(value)]
    return found if keep else {}


def _gathered(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    if not hasattr(value, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([value])


def count_parameters(model: Any) -> int:
    """The number of a model's weights, whole ones or shards of ZeRO-3."""
    sizes = [p.ds_numel for p in model.parameters() if hasattr(p, "ds_numel")]
    return sum(sizes) if sizes else model.num_parameters()
