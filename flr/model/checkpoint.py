"""Loading patched models: ours, adapters on them, LatentR3's checkpoints. It reads safetensors and JSON.

A run of training also leaves PyTorch's pickles in its ``checkpoint-*`` folders (optimiser, generators); nothing here
opens them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from flr.config import FLRConfig
from flr.files import naming

from .adapter import adapts_thought, base_name, base_revision, check_adapter, wrap
from .attention import check_attention
from .folder import (
    ADAPTER_CONFIG,
    CONFIG,
    HUB_OPTIONS,
    INDEX,
    WEIGHTS,
    PathLike,
    is_adapter,
    local_folder,
    read_weights,
    weight_files,
    weight_shapes,
)
from .gguf import GGUF_KEY, check_name, gguf_arguments, unpacked
from .patch import patch_model
from .saved_config import SavedConfig, holds_patched_model, read_config
from .variants import build_reasoner

#: Keyword arguments of transformers' loaders that have one value here.
_FIXED = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": False, "subfolder": ""}
#: Those that a configuration may have an attribute of, too.
_LOADERS = ("dtype", "torch_dtype", "quantization_config", "device_map", "gguf_file")


def from_pretrained(
    directory: PathLike,
    *,
    config: FLRConfig | None = None,
    is_trainable: bool = False,
    variant: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a patched model that ``model.save_pretrained`` or ``model.push_to_hub`` wrote.

    No code that comes with a model is run, and no pickle read. An adapter's folder (PEFT, ``modules_to_save=["flr"]``)
    gives the ``PeftModel`` around its base model, which is loaded from where adapter_config.json says.

    Args:
        directory: a folder, or the id ``"user/name"`` of a model on the Hub.
        config: of the thought, for an adapter whose folder and base model do not say it.
        is_trainable: an adapter's weights need gradients. A whole model's always do.
        variant: loads ``model.VARIANT.safetensors``.
        kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` for the Hub; others as
            for ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, attn_implementation …).

    Returns:
        The model, patched, in evaluation mode.

    Raises:
        ValueError: the config is not that of a patched model, or weights are missing, unexpected or of other shapes.
        OSError: no such folder, and no such model that can be reached.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                    num_attention_heads=4, num_key_value_heads=2)
        >>> model = patch_model(LlamaForCausalLM(tiny), config=FLRConfig(num_factors=3, thought_token_id=49))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = from_pretrained(folder)
        >>> again.config.flr["num_factors"], torch.equal(again.flr.query, model.flr.query)
        (3, True)
    """
    return load_from(directory, config=config, is_trainable=is_trainable, variant=variant, **kwargs)[0]


def load_from(
    directory: PathLike,
    *,
    config: FLRConfig | None = None,
    is_trainable: bool = False,
    variant: str | None = None,
    **kwargs: Any,
) -> tuple[Any, Path]:
    """As :func:`from_pretrained`: the model, and the folder on this machine where the files beside it lie."""
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if kwargs.get(name) is not None}
    folder = local_folder(directory, variant, **hub)
    if is_adapter(folder):
        with _blaming(folder, *kwargs):
            return _load_adapter(folder, config, is_trainable, variant, hub, kwargs), folder
    if config is not None:
        raise ValueError("config: expected None for a whole model, whose config.json says it, got an FLRConfig")
    with _blaming(folder, *kwargs):
        model = load_saved(folder, read_config(folder), variant, **kwargs)
    model.name_or_path = model.config.name_or_path = str(directory)  # not the place in the Hub's cache
    return model, folder


@contextlib.contextmanager
def _blaming(folder: Path, *arguments: str) -> Iterator[None]:
    """Errors that the content of ``folder`` may cause, in whichever library, name it; not those of an argument."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        if str(error).split(":")[0] in ("config", *arguments):
            raise
        with naming(folder, "a model whose files fit together"):
            raise


def load_saved(folder: Path, saved: SavedConfig, variant: str | None = None, **kwargs: Any) -> Any:
    """The model in ``folder`` whose config.json says ``saved``; arguments and errors as for :func:`from_pretrained`."""
    files, options = weight_files(folder, variant), saved.options
    _check_layers(folder, saved.base, files)
    _check_reasoner(folder, saved, weight_shapes(files, "flr."))
    model = _load_backbone(folder, "flr.", saved.base, variant=variant, **kwargs)
    own, model.generation_config = model.generation_config, GenerationConfig()
    patch_model(model, config=options, verify=False)
    _keep_settings(model, own)
    if hasattr(model, "flr"):
        _load_strictly(model.flr, read_weights(files, "flr."), folder)
    return model.eval()


def _keep_settings(model: Any, own: GenerationConfig | None) -> None:
    """Give a loaded model the generation settings that it was saved with: none of them is the base model's."""
    model._flr_patch.generation_config = own
    for name, value in {} if own is None else own.to_diff_dict().items():
        if name not in ("suppress_tokens", "use_cache", "transformers_version"):  # which the patch says
            setattr(model.generation_config, name, value)


def _check_layers(folder: Path, base: PreTrainedConfig, files: Sequence[Path]) -> None:
    """Refuse a configuration of more layers than there are weights, before a module is made for each."""
    weights, layers = len(weight_shapes(files, "")), getattr(base.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > weights:
        raise ValueError(
            f"{folder / CONFIG}: num_hidden_layers: expected at most {weights}, one a weight, got {layers}"
        )


def _check_reasoner(folder: Path, saved: SavedConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse weights that do not fit the configuration before there is memory taken for what it asks for."""
    with torch.device("meta"):
        reasoner = build_reasoner(saved.base.get_text_config().hidden_size, saved.options)
    own = {} if reasoner is None else {name: tuple(value.shape) for name, value in reasoner.state_dict().items()}
    wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
    if wrong:
        found = ", ".join(f"{name} {shapes.get(name, 'missing')} instead of {own.get(name, 'none')}" for name in wrong)
        raise ValueError(f"directory: expected weights that fit the reasoner in {folder}, got {found}")


def _load_adapter(
    folder: Path, config: FLRConfig | None, is_trainable: bool, variant: str | None, hub: dict[str, Any], kwargs: Any
) -> Any:
    """The adapter in ``folder`` on its base model, patched already or as config.json beside the adapter says."""
    name = base_name(folder)
    here = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    beside = read_config(folder) if (folder / CONFIG).is_file() else None
    packed = None if beside is None else getattr(beside.base, GGUF_KEY, None)
    if packed is not None:
        check_name(packed, f"{folder / CONFIG}: {GGUF_KEY}")
    try:
        base = folder if here else local_folder(name, variant, packed, **{**hub, "revision": base_revision(folder)})
    except OSError as error:
        raise OSError(f"{folder / ADAPTER_CONFIG}: base model: {error}") from error
    if not here and is_adapter(base):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: expected a whole base model, got {name!r}, an adapter")
    patched, added = packed is None and holds_patched_model(base), range(0)
    if patched:
        model = load_saved(base, read_config(base), variant, **kwargs)
    else:
        if config is None and beside is None:
            wanted = "config.json of the patched model beside the adapter (model.config.save_pretrained), or config="
            raise ValueError(f"directory: expected {wanted} for {folder}, got neither")
        own = {} if packed is None else gguf_arguments(base, packed)
        model = _load_backbone(base, "", None, variant=variant, **{**kwargs, **own})
        added = _patch_base(model, config or beside.options, None if beside is None else beside.base)  # type: ignore[union-attr]
    options = model._flr_patch.config
    given = config or (beside.options if beside is not None else None)
    if given is not None and given != options:
        raise ValueError(f"config: expected the thought of the base model, {options}, got {given}")
    check_adapter(folder, getattr(model, "flr", None), added, not patched)
    if packed is not None:
        setattr(model.config, GGUF_KEY, packed)
    return wrap(model, folder, is_trainable).eval()


def _patch_base(model: Any, options: FLRConfig, beside: PreTrainedConfig | None) -> range:
    """Give a plain base model the rows and the thought that an adapter needs; returns those but the thought's."""
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = rows if beside is None else int(beside.get_text_config().vocab_size)
    if options.thought_count and options.thought_token_id is None:
        raise ValueError("config: expected thought_token_id, got None")
    added = range(rows, wanted - (options.thought_token_id == wanted - 1))
    if added:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    patch_model(model, config=options, verify=False)
    return added


class _Quiet(logging.Filter):
    """Drops the loading report about keys that this module loads itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "UNEXPECTED" not in record.getMessage() and "not used when initializing" not in record.getMessage()


def _load_backbone(folder: Path, prefix: str, config: PreTrainedConfig | None, **kwargs: Any) -> Any:
    """The causal LM in ``folder``; raises unless the only unexpected ones among its weights are ``prefix``'s."""
    for name, only in _FIXED.items():
        if (value := kwargs.pop(name, None)) not in (None, only):
            raise ValueError(f"{name}: expected {only!r}, got {value!r}")
    check_attention(kwargs.get("attn_implementation"))
    for name in HUB_OPTIONS:  # the files are here
        kwargs.pop(name, None)
    packed = kwargs.get("gguf_file")
    if config is None:
        where = {} if packed is None else {"gguf_file": packed}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **where)
    else:
        config = copy.deepcopy(config)
    for name in [name for name in kwargs if hasattr(config, name) and name not in _LOADERS]:
        setattr(config, name, kwargs.pop(name))
    reports = logging.getLogger("transformers.modeling_utils")
    quiet = _Quiet()
    reports.addFilter(quiet)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    except RuntimeError as error:  # sizes that differ; the table of them is in the log
        text = " ".join(str(error).split())
        raise ValueError(f"directory: expected weights that fit config.json in {folder}, got {text:.300}") from error
    finally:
        reports.removeFilter(quiet)
    model, info = loaded
    unexpected = [key for key in info["unexpected_keys"] if not (prefix and key.startswith(prefix))]
    for name, keys in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if keys:
            raise ValueError(
                f"directory: expected a whole model in {folder}, got {len(keys)} {name} weights, e.g. {min(keys)!r}"
            )
    return model if packed is None else unpacked(model)


def holds_thought(folder: Path) -> bool:
    """Whether :func:`from_pretrained` loads ``folder``: a patched model, or an adapter on one.

    Raises:
        OSError, ValueError: it holds no model.
    """
    if (folder / CONFIG).is_file() or not is_adapter(folder):
        return holds_patched_model(folder)
    base = base_name(folder)
    return adapts_thought(folder) or holds_patched_model(local_folder(base))


def load_latentr3(directory: PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load a LatentR3 checkpoint: a causal LM's state dict plus ``attention.{query,key,value}.{weight,bias}``.

    The thought token is the last row of the embedding, as its code assumes.

    Args:
        directory: a folder.
        kwargs: as for ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, attn_implementation …).

    Raises:
        ValueError: the attention's weights are missing or of the wrong shape, or other weights do not fit.
    """
    folder = Path(directory)
    attention = read_weights(weight_files(folder), "attention.")
    if not attention:
        raise ValueError(f"directory: expected weights attention.query.weight … in {folder}, found none")
    model = _load_backbone(folder, "attention.", None, **kwargs)
    last = model.get_input_embeddings().weight.shape[0] - 1
    patch_model(model, config=FLRConfig(variant="latentr3", thought_token_id=last), verify=False)
    _load_strictly(model.flr, attention, folder)
    return model.eval()


def _load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"directory: expected weights that fit the reasoner in {folder}, got {error}") from error
