"""Folders of PEFT adapters: what the base model is, and whether the adapter holds all that a patched model needs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from flr.files import naming, read_json

from .adapter_mark import LIMIT, TOKENS, mark, unmarked
from .backbone import causal_lm, is_patched
from .folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, is_adapter, weight_shapes
from .gguf import GGUF_KEY
from .saved_config import write_config
from .trained_rows import rows_alone

_PREFIX = "base_model.model."  # of names of weights that PEFT writes


def base_name(folder: Path) -> str:
    """The folder or the model on the Hub that the adapter in ``folder`` was trained on.

    Raises:
        ValueError: adapter_config.json names none, or the weights are not in safetensors.
    """
    name = read_json(folder / ADAPTER_CONFIG, LIMIT).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: expected base_model_name_or_path, got {name!r}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"directory: expected {ADAPTER_WEIGHTS} in {folder}, found none")
    return name


def base_revision(folder: Path) -> str | None:
    """The branch, tag or commit of the base model that the adapter in ``folder`` was trained on, if it says one."""
    revision = read_json(folder / ADAPTER_CONFIG, LIMIT).get("revision")
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: revision: expected a name, got {revision!r}")
    return revision


def check_adapter(folder: Path, reasoner: nn.Module | None, rows: range, made: bool) -> None:
    """Refuse an adapter that leaves a part of the thought to chance.

    Args:
        folder: of the adapter.
        reasoner: that of the patched base model.
        rows: ids of tokens that were added to the base model beside the thought, whose embeddings nothing else holds.
        made: the base model came without a reasoner, so that the adapter must hold all of it.

    Raises:
        ValueError: weights of the reasoner are missing, too many or of other shapes, or embeddings are missing.
    """
    shapes = weight_shapes([folder / ADAPTER_WEIGHTS], _PREFIX)
    saved = {name[len("flr.") :]: shape for name, shape in shapes.items() if name.startswith("flr.")}
    own = {} if reasoner is None else {name: tuple(value.shape) for name, value in reasoner.state_dict().items()}
    if saved != own and (saved or made):
        wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        wanted = "weights of the whole reasoner (modules_to_save=['flr'])"
        raise ValueError(f"directory: expected {wanted} in {folder / ADAPTER_WEIGHTS}, got others for {wrong}")
    if not rows:
        return
    wanted = f"embeddings of the {len(rows)} tokens that were added to the base model"
    if not any("embed" in name or "wte" in name or "token_adapter" in name for name in shapes):
        raise ValueError(f"directory: expected {wanted} in {folder / ADAPTER_WEIGHTS}, found none")
    if any("token_adapter" in name for name in shapes):
        given = unmarked(read_json(folder / ADAPTER_CONFIG, LIMIT).get(TOKENS))
        lists = given.values() if isinstance(given, dict) else [given]
        for ids in lists:
            known = set(ids) if isinstance(ids, list) and all(isinstance(i, int) for i in ids) else set()
            if missing := [row for row in rows if row not in known]:
                got = f"none for {len(missing)} of them, e.g. {missing[0]}"
                raise ValueError(f"{folder / ADAPTER_CONFIG}: {TOKENS}: expected {wanted}, got {got}")


def adapts_thought(folder: Path) -> bool:
    """Whether the adapter in ``folder`` holds weights of a reasoner."""
    return bool(weight_shapes([folder / ADAPTER_WEIGHTS], f"{_PREFIX}flr."))


def wrap(model: Any, folder: Path, is_trainable: bool) -> Any:
    """``model`` as a ``PeftModel`` with the adapter in ``folder``."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"peft: expected the package peft, which reads the adapter in {folder}, got none") from error
    with naming(folder, "an adapter that fits its base model"):
        config = peft.PeftConfig.from_pretrained(str(folder))
        if hasattr(config, TOKENS):
            setattr(config, TOKENS, unmarked(getattr(config, TOKENS)))
        options: dict[str, Any] = {"is_trainable": is_trainable, "config": config}
        return saved_alone(peft.PeftModel.from_pretrained(model, str(folder), **options))


def saved_alone(model: Any) -> Any:
    """``model``, a ``PeftModel`` around a patched one, which saves what is its own, and so that only flr loads it.

    Where it holds rows of chosen tokens, it computes with them alone, too: PEFT copies the table for them at every use,
    and saves it wherever the vocabulary has grown, although no other row of it has changed.
    """
    has_rows = bool(getattr(model.peft_config[model.active_adapter], TOKENS, None))
    if has_rows:
        rows_alone(model)
    model.save_pretrained = functools.partial(_save, model, **({"save_embedding_layers": False} if has_rows else {}))
    return model


def _save(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if is_patched(lm := causal_lm(model)) and kwargs.get("is_main_process", True):
        for name in model.peft_config:
            mark(Path(save_directory) / ("" if name == "default" else name), lm)


@contextlib.contextmanager
def without_card(model: Any) -> Iterator[None]:
    """Saves of ``model`` in the block write no card of PEFT's: a form to fill in, with the base model's folder."""
    adapted = hasattr(model, "create_or_update_model_card")
    if adapted:
        model.__dict__["create_or_update_model_card"] = lambda *_, **__: None
    try:
        yield
    finally:
        if adapted:
            del model.__dict__["create_or_update_model_card"]


def write_beside(folder: Path, model: Any) -> None:
    """Write config.json of the patched ``model`` beside an adapter in ``folder``: PEFT names the base model alone."""
    if is_adapter(folder) and is_patched(model):
        write_config(folder / CONFIG, model.config, model.config.flr)
        mark(folder, model)


def merged(model: Any) -> Any:
    """The patched model that answers as ``model``, a ``PeftModel``, without it; ``model`` is used up.

    Weights are added in their own dtype: float32 loses nothing.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"model: expected an adapter on a model, got {type(model).__name__} without one")
    whole = model.merge_and_unload(safe_merge=True)
    whole.config.__dict__.pop(GGUF_KEY, None)
    return whole.eval()
