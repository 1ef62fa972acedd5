"""Low-rank adapters (PEFT's LoRA) on a patched model: the reasoner and the tokens of the items are trained beside them.

What such a model holds of its own is small: two thin matrices a layer, the whole reasoner (``modules_to_save``), and
the rows of tokens that the items brought (``trainable_token_indices``), in the lm_head too where that is a table of its
own. Everything else stays as it was loaded, in any dtype or in four bits, and gets no optimizer state.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from flr.config import ALL_LINEAR
from flr.data import RecProcessor
from flr.data.codecs import END_TOKEN
from flr.model.adapter import saved_alone
from flr.model.backbone import is_patched

from .precision import raise_trained

_OWN_OF_TITLES = re.compile(rf"<\|same_\d+\|>|{re.escape(END_TOKEN)}")


@dataclass(frozen=True)
class LoraSettings:
    """What :func:`add_lora` adds.

    Attributes:
        rank: r >= 1, of the product that is added to a weight.
        alpha: > 0; the product is scaled by alpha / rank.
        dropout: on the adapters' input, in [0, 1).
        targets: names of modules, as ``q_proj``, or ``("all-linear",)``: all linear ones but head and reasoner.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)


def own_tokens(processor: RecProcessor) -> list[int]:
    """Ids of the tokens that stand for items and the thought, not for text, ascending: their rows are learned.

    Of codec "id" and "sid" all tokens of items; of "title" the end of an item and what tells equal titles apart.
    """
    tokenizer, codec = processor.tokenizer, processor.item_codec
    if codec.name == "title":
        own = {i for token, i in tokenizer.get_vocab().items() if _OWN_OF_TITLES.fullmatch(token)}
        ids = own.intersection(np.unique(codec.tokens).tolist())
    else:
        ids = set(np.unique(codec.tokens).tolist())
    if processor.num_thoughts:
        ids.add(processor.thought_token_id)
    return sorted(ids)


def add_lora(
    model: Any, settings: LoraSettings, tokens: Sequence[int], base: str | None = None, revision: str | None = None
) -> Any:
    """A ``PeftModel`` around ``model`` whose adapters, reasoner and rows of ``tokens`` are trained, in float32.

    Args:
        model: patched, whole, of any dtype; changed in place.
        settings: of the adapters.
        tokens: ids whose rows are trained, of the input embeddings and of an lm_head that is not tied to them.
        base: where those who load the adapter find its base model: a folder or an id on the Hub. Default: where
            ``model`` came from.
        revision: of the base model on the Hub.

    Raises:
        ValueError: a target that the model lacks, an lm_head with a bias, or no package peft.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import flr
        >>> tiny = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                    num_attention_heads=4, num_key_value_heads=2)
        >>> model = flr.patch_model(LlamaForCausalLM(tiny), config=flr.FLRConfig(num_factors=2, thought_token_id=49))
        >>> adapted = add_lora(model, LoraSettings(rank=4, alpha=8, targets=("q_proj",)), [48, 49])
        >>> trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        >>> [sum(part in name for name in trained) for part in ("lora_A", "lora_B", "trainable_tokens_delta")]
        [1, 1, 2]
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank: expected the package peft for adapters, got none; pip install 'flr[peft]'")
    import peft

    if not is_patched(model):
        raise ValueError(f"model: expected a patched model without adapters, got {type(model).__name__}")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float does as well
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.targets),
        modules_to_save=["flr"] if hasattr(model, "flr") else None,
        trainable_token_indices=_rows(model, tokens),
        task_type="CAUSAL_LM",
        revision=revision,
    )
    adapted = peft.get_peft_model(model, config)
    config.base_model_name_or_path = base or config.base_model_name_or_path
    return raise_trained(saved_alone(adapted))


def _targets(model: Any, names: Sequence[str]) -> str | list[str]:
    if tuple(names) == (ALL_LINEAR,):
        return ALL_LINEAR
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _adaptable(module) and module is not head]
    known = {name.rpartition(".")[2] for name in linear if not name.startswith("flr.")}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"lora_targets: expected {ALL_LINEAR}, or of {', '.join(sorted(known))}, got {wrong[0]!r}")
    return list(names)


def _adaptable(module: nn.Module) -> bool:
    """A linear layer, GPT-2's and quantised ones too."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _rows(model: Any, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Rows of the token tables by the name of the table."""
    if not tokens:
        return None
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    tables, head = [model.get_input_embeddings()], model.get_output_embeddings()
    if head.weight is not tables[0].weight:
        if getattr(head, "bias", None) is not None:
            wanted = "an lm_head without a bias, which PEFT leaves out of rows that are trained"
            raise ValueError(f"lora_rank: expected {wanted}, got that of {type(model).__name__}")
        tables.append(head)
    return {names[id(table)]: list(tokens) for table in tables}


def quantisation(use_cpu: bool = False) -> Any:
    """The configuration that loads linear layers in four bits (NF4, scales quantised too), products in bfloat16.

    Raises:
        ValueError: bitsandbytes is missing, or does not work on this machine.
    """
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if importlib.util.find_spec("bitsandbytes") is None or not is_bitsandbytes_available():
        wanted = "the package bitsandbytes, on a machine where it works"
        raise ValueError(f"load_in_4bit: expected {wanted}, got none; pip install 'flr[qlora]'")
    on_gpu = torch.cuda.is_available() and not use_cpu
    compute = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
