"""The file of the items' tokens: it saves the tokenising, and is never believed where it does not belong."""

from __future__ import annotations

import json
import logging
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flr.data import Catalogue, RecProcessor, build_tokenizer
from flr.data import codecs as module
from flr.data.digests import array_digest
from flr.data.token_store import STORE_NAME
from flr.decode import CatalogueTrie

TITLES = ["Blue Train", "Blue Train", "Kind of Blue", "Giant Steps"]


@pytest.fixture(params=["title", "id"])
def folder(request, tmp_path):
    catalogue = Catalogue(["a", "b", "c", "d"], TITLES)
    tokenizer = build_tokenizer(catalogue, request.param, vocab_size=300)
    RecProcessor(tokenizer, catalogue, request.param).save_pretrained(tmp_path)
    return tmp_path


def refused(*args, **kwargs):
    raise AssertionError("nothing is to be made again")


def assert_same(a, b):
    np.testing.assert_array_equal(a.item_codec.tokens, b.item_codec.tokens)
    np.testing.assert_array_equal(a.item_codec.offsets, b.item_codec.offsets)
    assert a.digests() == b.digests()
    mine, theirs = (CatalogueTrie.from_codec(x.item_codec).arrays() for x in (a, b))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_loading_makes_nothing_again(folder):
    (folder / STORE_NAME).rename(folder / "away")
    made = RecProcessor.from_pretrained(folder)  # as from a folder of before there was a store
    (folder / "away").rename(folder / STORE_NAME)
    with (
        mock.patch.object(module, "title_tokens", refused),
        mock.patch.object(module, "find_prefix", refused),
        mock.patch.object(CatalogueTrie, "from_sequences", refused),
    ):
        loaded = RecProcessor.from_pretrained(folder)
        CatalogueTrie.from_codec(loaded.item_codec)
    assert_same(loaded, made)
    assert loaded.item_codec.decode(loaded.item_codec.encode(1)) == 1


def test_a_store_of_other_files_is_not_used(folder, tmp_path_factory, caplog):
    """Titles change place: tokens of the old ones would be as plausible, and wrong."""
    other = tmp_path_factory.mktemp("other")
    processor = RecProcessor.from_pretrained(folder)
    codec = processor.codec
    catalogue = Catalogue(["a", "b", "c", "d"], TITLES[::-1])
    RecProcessor(processor.tokenizer, catalogue, codec).save_pretrained(other)
    (other / STORE_NAME).write_bytes((folder / STORE_NAME).read_bytes())
    with caplog.at_level(logging.WARNING, "flr"):
        loaded = RecProcessor.from_pretrained(other)
    assert "belongs to another catalogue or tokenizer; the items are tokenised again" in caplog.text
    assert_same(loaded, RecProcessor(processor.tokenizer, catalogue, codec))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")  # the tokenizer's files count, whatever the change
    caplog.clear()
    RecProcessor.from_pretrained(folder)
    assert "belongs to another catalogue or tokenizer" in caplog.text


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "format", "folder", "sizes"])
def test_a_damaged_store_is_refused_by_name(folder, damage):
    path = folder / STORE_NAME
    content = path.read_bytes()
    if damage == "bit":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        with safe_open(str(path), framework="pt") as file:
            about, arrays = json.loads(file.metadata()["flr"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if damage == "format":
            about["format"] = "another"
        else:  # with a digest that fits
            arrays["item_offsets"] = arrays["item_offsets"][:-1].clone()
            about["sha256"] = array_digest(arrays)
        save_file(arrays, path, metadata={"flr": json.dumps(about)})
    with pytest.raises(ValueError, match=STORE_NAME):
        RecProcessor.from_pretrained(folder)


def test_a_reload_takes_over_the_same_catalogue(folder):
    first = RecProcessor.from_pretrained(folder)
    with mock.patch.object(Catalogue, "load", refused):
        again = RecProcessor.from_pretrained(folder, first)
    assert again.catalogue is first.catalogue
    assert again.item_codec is first.item_codec
    assert_same(again, first)
    changed = Catalogue(["a", "b", "c", "e"], TITLES)
    RecProcessor(first.tokenizer, changed, first.codec).save_pretrained(folder)
    assert RecProcessor.from_pretrained(folder, first).catalogue == changed


def test_a_codec_of_another_catalogue_is_refused(folder):
    processor = RecProcessor.from_pretrained(folder)
    few = Catalogue(["a"], ["Blue"])
    with pytest.raises(ValueError, match=r"item_codec: expected .* of 1 items, got .* of 4"):
        RecProcessor(processor.tokenizer, few, processor.codec, item_codec=processor.item_codec)
