"""What shapes a run, by name: two runs with the same settings end at the same weights, and may continue each other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from flr.data import Augment, Interactions, RecProcessor
from flr.model.backbone import causal_lm

#: Arguments that say where a run computes, what it reports and what it keeps, not where it ends. Every other one
#: counts, those of later versions of transformers too.
APART = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project", "report_to",
    "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy", "logging_steps",
    "logging_first_step", "logging_nan_inf_filter", "include_num_input_tokens_seen", "save_total_limit",
    "save_on_each_node", "save_only_model", "use_cpu", "local_rank", "ddp_backend", "ddp_timeout",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_static_graph",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "per_device_eval_batch_size", "skip_memory_metrics",
    "torch_empty_cache_steps", "debug", "eval_on_start", "prompt_cache_gb",
}  # fmt: skip
#: Of a model's configuration: where it came from, not what it is.
_ORIGIN = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "use_cache")
_SHOWN = 8  # differences in an error


def run_settings(
    name: str,
    args: Any,
    model: nn.Module,
    processor: RecProcessor,
    train: Interactions,
    valid: Interactions | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings of a run as a flat object of JSON values.

    Args:
        name: of the trainer.
        args: a ``TrainingArguments``.
        model: before its first step; its weights count.
        processor, train, valid: as for the trainer; tokens, items and rows count.
        more: what else a trainer goes by.
    """
    settings = {
        "trainer": name,
        "processes": args.world_size,
        **{key: value for key, value in args.to_dict().items() if key not in APART},
        **_of_model(model),
        **_of_processor(processor, train),
        "data.train": rows_digest(train),
        "data.valid": None if valid is None else rows_digest(valid),
        **more,
    }
    return json.loads(json.dumps(_flat(settings), sort_keys=True, default=str))


def of_augment(augment: Augment | None) -> dict[str, Any]:
    """Settings of an :class:`Augment`, its table of neighbours as a digest."""
    if augment is None:
        return {}
    values = {f"augment_{f.name}": getattr(augment, f.name) for f in dataclasses.fields(augment)}
    if augment.neighbours is not None:
        values["augment_neighbours"] = digest(augment.neighbours)
    if augment.teacher is not None:
        values["augment_teacher"] = digest(augment.teacher.follows_from())
    return values


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two objects of settings, an entry each: ``learning_rate was 0.001 and is 0.002``."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name} was {_text(before, name)} and is {_text(now, name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def check_same(place: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError that names what differs between the run that wrote ``place`` and the one that finds it there."""
    found = differences(before, now)
    if found:
        rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"output_dir: expected the run that {place} is of, got another one: {'; '.join(found[:_SHOWN])}{rest}. "
            "Choose another output_dir, or delete what is there with --overwrite_output_dir true"
        )


def digest(arrays: Iterable[Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of arrays, tensors and texts."""
    total = hashlib.sha256()
    for value in arrays:
        if isinstance(value, torch.Tensor):
            total.update(f"{tuple(value.shape)} {value.dtype}".encode())
            if value.is_meta or hasattr(value, "device_mesh"):  # not here, or a part of it only
                continue
            value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if isinstance(value, np.ndarray):
            total.update(f"{value.shape} {value.dtype}".encode())
            total.update(np.ascontiguousarray(value).data)
        else:
            text = str(value).encode("utf-8", "surrogatepass")
            total.update(len(text).to_bytes(8, "little") + text)
    return total.hexdigest()[:16]


def _of_model(model: nn.Module) -> dict[str, Any]:
    state = model.state_dict()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    config = causal_lm(model).config.to_dict()
    return {
        "model": {name: value for name, value in config.items() if name not in _ORIGIN},
        "model.weights": digest(part for name in sorted(state) for part in (name, state[name])),
        "model.trainable": f"{len(trainable)} tensors {digest(trainable)}",
    }


def _of_processor(processor: RecProcessor, train: Interactions) -> dict[str, Any]:
    catalogue, codec = processor.catalogue, processor.item_codec
    names = ("codec", "max_history", "max_prompt_tokens", "max_title_tokens", "num_thoughts", "thought_token")
    views = processor.views
    prompts = processor.prompts(train.histories.take(np.arange(min(64, len(train)))))
    return {
        **{name: getattr(processor, name) for name in names},
        "template": dataclasses.asdict(processor.template),
        "views": None if views is None else dataclasses.asdict(views),
        "scoring": processor.scoring,
        "data.items": f"{len(catalogue)} items {catalogue.digest()[:16]}",
        "data.codes": digest([codec.tokens, codec.offsets]),
        "data.prompts": digest([prompts.tokens.values, prompts.tokens.offsets]),
    }


def rows_digest(rows: Interactions) -> str:
    """The number of rows, and a digest of histories, targets and users."""
    parts = (rows.histories.values, rows.histories.offsets, rows.targets, *_joined(rows.users))
    return f"{len(rows)} rows {digest(parts)}"


def _joined(*lists: list[str]) -> list[str]:
    """Each list as one text: millions of short ones take longer."""
    return ["\0".join(texts) for texts in lists]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = inner
    return flat


def _text(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name]) if name in settings else "absent"
    return text if len(text) <= 60 else f"{text[:57]}…"
