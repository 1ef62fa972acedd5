"""A processor in a folder beside its model: tokenizer, catalogue, items' tokens, neighbours, settings."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flr.files import PathLike, naming, read_json, shown, temporary_folder, write_json

from .catalogue import Catalogue
from .item_knn import KNN_NAME, NeighbourTable
from .prompt import HistoryViews, PromptTemplate
from .saved_tokenizer import load_tokenizer
from .token_store import Stored, read_store, store_key, write_store

CONFIG_NAME = "processor_config.json"
CATALOGUE_NAME = "catalogue.parquet"
_VERSION = 1
_MAX_CONFIG = 1 << 20  # bytes
_SETTINGS = ("max_history", "num_thoughts", "thought_token", "max_prompt_tokens", "max_title_tokens")


def save_processor(processor: Any, path: PathLike) -> None:
    """What :meth:`RecProcessor.save_pretrained` says."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    with temporary_folder(folder / "tokenizer") as temporary:
        processor.tokenizer.save_pretrained(temporary)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    processor.catalogue.save(folder / CATALOGUE_NAME)
    digests = processor.digests()
    save_item_knn(folder, processor.item_knn)
    write_store(folder, processor.item_codec, processor.max_title_tokens, digests)
    write_json(
        folder / CONFIG_NAME,
        {
            "version": _VERSION,
            "tokenizer_class": type(processor.tokenizer).__name__,
            "codec": processor.codec,
            "template": asdict(processor.template),
            **{name: getattr(processor, name) for name in _SETTINGS},
            "thought_token_id": processor.thought_token_id,
            "max_positions": processor.max_positions,
            "views": None if processor.views is None else asdict(processor.views),
            "scoring": processor.scoring,
            "growth": list(processor.growth),
            "vocabulary_size": len(processor.tokenizer),
            "codec_tokens": len(processor.item_codec.tokens),
            "digests": digests,
        },
    )


def load_processor(kind: Any, path: PathLike, like: Any = None) -> Any:
    """What :meth:`RecProcessor.from_pretrained` says."""
    folder = Path(path)
    file = folder / CONFIG_NAME
    config = read_json(file, _MAX_CONFIG)
    if config.get("version") != _VERSION:
        raise ValueError(f"{file}: expected version {_VERSION}, got {shown(config.get('version'), 80)}")
    with naming(file, "the settings of a processor"):
        key = store_key(folder, config["codec"], config["max_title_tokens"])
    if like is not None and like._store_key == key:
        catalogue = like.catalogue
        stored: Stored | None = Stored(like.item_codec, config.get("digests", {}))
    else:
        catalogue = Catalogue.load(folder / CATALOGUE_NAME)
        stored = read_store(folder, key, config["codec"], len(catalogue))
    # AutoTokenizer would go by the model's config.json beside it, and rebuild our tokenizer as that model's own
    with naming(folder, "a tokenizer"):
        tokenizer = load_tokenizer(folder, config.get("tokenizer_class"))
    size = len(tokenizer)
    with naming(file, "the settings of a processor"):
        views = None if config.get("views") is None else HistoryViews(**config["views"])
    item_knn = _item_knn(folder, views, len(catalogue))
    with naming(file, "the settings of a processor"):
        processor = kind(
            tokenizer,
            catalogue,
            config["codec"],
            PromptTemplate(**config["template"]),
            **{name: config[name] for name in _SETTINGS},
            views=views,
            item_knn=item_knn,
            scoring=config.get("scoring", "full"),  # absent before there was a choice
            item_codec=None if stored is None else stored.codec,
            growth=config.get("growth", ()),  # absent before catalogues grew
        )
        processor.fit_positions(config.get("max_positions"))  # absent before there was a bound
        rebuilt = (size, len(tokenizer), processor.thought_token_id, len(processor.item_codec.tokens))
        saved = (*[config["vocabulary_size"]] * 2, config["thought_token_id"], config["codec_tokens"])
    if rebuilt != saved:
        raise ValueError(
            f"{folder}: expected tokenizer and catalogue of this {CONFIG_NAME}: (vocabulary, the same after "
            f"rebuilding the codec, thought token id, item tokens) {shown(saved)}, got {rebuilt}"
        )
    processor._store_key = key
    expected = config.get("digests", {})  # absent in older folders
    same = stored is not None and stored.digests == expected  # of the files that the store's key names
    digests = {"tokens": processor._tokens_digest()} if same else processor.digests()
    for name, digest in digests.items() if expected else ():
        if not isinstance(expected, dict) or expected.get(name) != digest:
            wanted = f"the {name} of this {CONFIG_NAME}"
            raise ValueError(f"{folder}: expected {wanted}, got another one (its digest differs)")
    return processor


def save_item_knn(folder: PathLike, table: NeighbourTable | None) -> None:
    """Write ``item_knn.safetensors`` into ``folder``, or see that there is none."""
    file = Path(folder) / KNN_NAME
    if table is None:
        file.unlink(missing_ok=True)
    else:
        table.save(file)


def save_views(folder: PathLike, views: HistoryViews, table: NeighbourTable | None = None) -> None:
    """Change the views, and the table of item-kNN if one is given, of a processor in ``folder``, and nothing else.

    Views without weight are saved as none, so that answers do not go by the longer way of a mixture.
    """
    file = Path(folder) / CONFIG_NAME
    config = read_json(file, _MAX_CONFIG)
    if table is not None:
        save_item_knn(folder, table)
    write_json(file, {**config, "views": asdict(views) if views.mixes else None})


def _item_knn(folder: Path, views: HistoryViews | None, size: int) -> NeighbourTable | None:
    """The table in ``folder``, if there is one; ValueError where ``views`` need one that is missing."""
    file = folder / KNN_NAME
    if file.exists():
        return NeighbourTable.load(file, size)
    if views is not None and views.neighbours > 0:
        raise ValueError(f"{file}: expected the table of item-kNN that {CONFIG_NAME} names, it is missing")
    return None
