"""Options that say how weights are loaded and which of them are trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import (
    ALL_LINEAR,
    ATTENTION,
    COUNT_FROM_ZERO,
    DTYPES,
    POSITIVE,
    SHARE,
    Numbers,
    check_beside,
    check_numbers,
    option,
)

from .options import check_option

if TYPE_CHECKING:
    from flr.train.lora import LoraSettings


@dataclass(kw_only=True)  # classes that add these fields keep the order of their own
class WeightOptions:
    """How weights are held, and by what the attention is computed."""

    dtype: str = option(
        "auto",
        f"What the backbone's weights are loaded in: {', '.join(DTYPES)}. Default: float32 for weights that are "
        "trained, else as saved.",
    )
    attn_implementation: str | None = option(
        None, f"How the backbone computes its attention: {', '.join(ATTENTION)}. Default: what transformers chooses."
    )

    def __post_init__(self) -> None:
        check_option(self, f"one of {', '.join(DTYPES)}", self.dtype in DTYPES, "dtype")
        known = self.attn_implementation in (None, *ATTENTION)
        check_option(self, f"one of {', '.join(ATTENTION)}", known, "attn_implementation")

    def attention(self) -> dict[str, Any]:
        """The loader's argument that names the attention, if one is asked for."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}

    def as_saved(self) -> dict[str, Any]:
        """The loader's arguments for a model that is not trained."""
        return {**({} if self.dtype == "auto" else {"dtype": self.dtype}), **self.attention()}

    def to_train(self, trained: bool, use_cpu: bool) -> dict[str, Any]:
        """The loader's arguments for a model whose backbone is trained, or frozen; see ``flr.train.precision``."""
        from flr.train.precision import dtype_to_load

        return {"dtype": dtype_to_load(self.dtype, trained, use_cpu), **self.attention()}


@dataclass(kw_only=True)
class InferenceOptions(WeightOptions):
    """The same, and where a model computes that is not trained."""

    device: str = option("auto", "Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, …")

    def as_saved(self) -> dict[str, Any]:
        """The loader's arguments, ``device`` among them."""
        return {**super().as_saved(), "device": device_named(self.device)}


def device_named(name: str) -> str:
    """A device of this machine; of ``auto`` a GPU where there is one, each process of a launcher its own.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"device: expected auto or a device of this machine, got {name!r}: {reason:.100}") from None
    return name


@dataclass(kw_only=True)
class LoraOptions:
    """Adapters instead of weights."""

    lora_rank: int = option(0, "Train low-rank adapters (LoRA) of this rank instead of the backbone; 0 for none.")
    lora_alpha: float | None = option(None, "LoRA: the product is scaled by alpha / rank. Default: twice the rank.")
    lora_dropout: float = option(0.0, "LoRA: dropout on the adapters' input.")
    lora_targets: str = option(
        ALL_LINEAR, "LoRA: names of layers with a comma between, e.g. q_proj,v_proj; all-linear leaves out the head."
    )
    load_in_4bit: bool = option(False, "LoRA: hold the backbone in four bits (QLoRA, by bitsandbytes).")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "lora_rank": COUNT_FROM_ZERO,
        "lora_alpha": POSITIVE.or_none,
        "lora_dropout": SHARE,
    }

    def __post_init__(self) -> None:
        check_numbers(self, self.numbers)
        check_option(self, "names of layers", all(self._names()), "lora_targets")
        needed = ("a lora_rank", bool(self.lora_rank))
        check_beside(self, dict.fromkeys(("lora_alpha", "lora_dropout", "lora_targets"), needed))

    def _names(self) -> list[str]:
        return [name.strip() for name in self.lora_targets.split(",")]

    def lora(self) -> LoraSettings | None:
        """What to add; None for nothing."""
        if not self.lora_rank:
            return None
        from flr.train.lora import LoraSettings

        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return LoraSettings(self.lora_rank, alpha, self.lora_dropout, tuple(self._names()))

    def quantised(self, use_cpu: bool) -> dict[str, Any]:
        """The loader's argument for four bits, if they are asked for."""
        if not self.load_in_4bit:
            return {}
        from flr.train.lora import quantisation

        return {"quantization_config": quantisation(use_cpu)}
