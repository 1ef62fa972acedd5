"""Embeddings of items: texts, co-occurrence without a look at held-out rows, language models, files."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flr.data import Catalogue, Interactions, RecDataset, build_tokenizer
from flr.sids import embed_items, item_texts
from tests.helpers.catalogues import DATA


def dataset_of(catalogue: Catalogue, train: Interactions | None = None) -> RecDataset:
    none = Interactions([], [], [])
    return RecDataset(catalogue, train or none, none, none)


TEXTS = Catalogue(
    ["1", "2", "3"],
    ["Blue Train", "Blue Train live", ""],
    attributes={"artist": ["Coltrane", "", ""], "year": [1957, 1960, 1970], "label": ["x", "y", "z"]},
)


def test_texts_are_titles_and_what_attributes_say():
    assert item_texts(TEXTS) == ["Blue Train. artist: Coltrane", "Blue Train live", ""]
    assert item_texts(TEXTS, ["label"])[2] == "label: z"
    for fields in (["year"], ["lable"]):
        with pytest.raises(
            ValueError, match=r"text_fields: expected text attributes of the catalogue \(artist, label\)"
        ):
            item_texts(TEXTS, fields)
    with pytest.raises(ValueError, match="embed: expected items with titles or text attributes, got none"):
        item_texts(Catalogue(["1", "2"], ["1", ""]))


def test_items_with_words_in_common_are_near_by_tfidf():
    embedded = embed_items(dataset_of(TEXTS), "tfidf", size=8)
    assert embedded.values.shape == (3, 8)
    assert embedded.values.dtype == np.float32
    assert embedded.values[0] @ embedded.values[1] > embedded.values[0] @ embedded.values[2] + 0.1
    assert embedded.empty == 1
    assert embedded.source == {"kind": "tfidf", "size": 8, "seed": 0}


def test_held_out_rows_never_change_an_embedding_by_cooccurrence():
    whole = embed_items(DATA, "cooccurrence", size=8).values
    size = len(DATA.catalogue)
    others = Interactions(
        ["x"] * 50, [[i % size, (i + 1) % size] for i in range(50)], [(i * 7) % size for i in range(50)]
    )
    changed = RecDataset(DATA.catalogue, DATA.train, others, others)
    assert np.array_equal(whole, embed_items(changed, "cooccurrence", size=8).values)
    leaky = RecDataset(DATA.catalogue, others, DATA.valid, DATA.test)  # the comparison can fail
    assert not np.array_equal(whole, embed_items(leaky, "cooccurrence", size=8).values)


def test_items_that_stand_together_are_near_by_cooccurrence():
    train = Interactions(list("uvwx"), [[0], [1], [0], [2]], [1, 0, 1, 3])
    embedded = embed_items(dataset_of(Catalogue(list("abcde"), list("abcde")), train), "cooccurrence", size=4)
    near = embedded.values @ embedded.values.T
    assert near[0, 1] > near[0, 2] + 0.5
    assert embedded.empty == 1
    with pytest.raises(ValueError, match="embed: expected training rows with histories for cooccurrence, got none"):
        embed_items(dataset_of(TEXTS), "cooccurrence")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = build_tokenizer(TEXTS, "title", vocab_size=300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_a_language_models_mean_state_leaves_padding_out(lm):
    folder, model, tokenizer = lm
    embedded = embed_items(dataset_of(TEXTS), str(folder), batch_size=3, progress=False)
    for row, text in enumerate(["Blue Train. artist: Coltrane", "Blue Train live", "?"]):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = model.model(input_ids=ids).last_hidden_state.mean(1)[0].detach().numpy()
        np.testing.assert_allclose(embedded.values[row], expected, atol=1e-5)
    alone = embed_items(dataset_of(TEXTS), str(folder), batch_size=1, progress=False)
    np.testing.assert_allclose(alone.values, embedded.values, atol=1e-5)
    assert embedded.source["kind"] == "lm"
    assert embedded.source["sha256"]["model.safetensors"]
    short = embed_items(dataset_of(TEXTS), str(folder), max_tokens=1, progress=False)
    np.testing.assert_allclose(short.values[0], short.values[1], atol=1e-6)


def test_a_text_is_cut_to_the_positions_that_a_model_has_learned(lm, tmp_path, caplog):
    tokenizer = lm[2]
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=3, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cut = embed_items(dataset_of(TEXTS), str(tmp_path), progress=False)
    assert f"{tmp_path}: texts are cut to its 3 positions, and not to embed_max_tokens (256)" in caplog.text
    caplog.clear()
    short = embed_items(dataset_of(TEXTS), str(tmp_path), max_tokens=3, progress=False)
    assert np.array_equal(cut.values, short.values)
    assert not caplog.records


def test_sentence_transformers_is_asked_for_by_its_folder(lm, tmp_path, monkeypatch):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Transformer"}]))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModuleNotFoundError, match="sentence_transformers"):
        embed_items(dataset_of(TEXTS), str(tmp_path), progress=False)
    asked = {}

    class Model:
        max_seq_length = 512

        def __init__(self, name, **options):
            asked.update(options, name=name)

        def encode(self, texts, **options):
            return np.full((len(texts), 4), len(texts[0]), np.float64)

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Model))
    embedded = embed_items(dataset_of(TEXTS), str(tmp_path), progress=False)
    assert embedded.values.shape == (3, 4)
    assert embedded.source["kind"] == "sentence-transformers"
    assert asked["trust_remote_code"] is False
    assert asked["model_kwargs"] == {"use_safetensors": True}
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "os.system"}]))
    with pytest.raises(ValueError, match=r"expected modules of sentence_transformers, got 'os.system'"):
        embed_items(dataset_of(TEXTS), str(tmp_path), progress=False)


def test_a_file_has_one_finite_row_an_item(tmp_path):
    path = tmp_path / "x.npy"
    x = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(path, x)
    embedded = embed_items(dataset_of(TEXTS), str(path))
    assert np.array_equal(embedded.values, x.astype(np.float32))
    cases = {
        r"embeddings: expected \[3, 1 to 65536\], one row an item, got \[2, 2\]": x[:2],
        r"one row an item, got \[6\]": x.ravel(),
        "expected finite numbers, got others in 1 rows, the first 1": np.where(x == 3, np.inf, x),
        "expected numbers, got dtype": x.astype(str),
        "expected an array of numbers in .npy form": np.array([[object()]] * 3),
    }
    for message, array in cases.items():
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            embed_items(dataset_of(TEXTS), str(path))
    path.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ValueError, match=r"x.npy: expected an array of numbers in .npy form"):
        embed_items(dataset_of(TEXTS), str(path))
    with pytest.raises(ValueError, match=r"expected a .npy file at .*absent.npy, got none"):
        embed_items(dataset_of(TEXTS), str(tmp_path / "absent.npy"))


def test_sizes_are_positive():
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        embed_items(DATA, "tfidf", size=0)
