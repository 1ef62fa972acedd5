"""Semantic IDs in prepared folders: written whole, replaced when told to, continued for new items; and the command."""

import json
import os
import shutil

import numpy as np
import pytest
import transformers.modeling_utils  # noqa: F401 - kill_at needs it, and forks then have it

from flr.cli import main
from flr.data import Catalogue, Interactions, RecDataset, RecProcessor, build_tokenizer
from flr.data.codes import read_codes
from flr.sids import Codebooks, import_codes, make_codes, update_codes
from tests.helpers.catalogues import DATA
from tests.helpers.kills import in_child, kill_at

SMALL = {"levels": 2, "codes": 8, "iterations": 4, "progress": False}
PLAIN = Catalogue(DATA.catalogue.item_ids, DATA.catalogue.titles, None, DATA.catalogue.attributes)


def prepared(path, catalogue=PLAIN):
    RecDataset(catalogue, DATA.train, DATA.valid, DATA.test, "small").save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    return prepared(tmp_path / "data")


def test_codes_are_written_into_the_folder(folder):
    (folder / "notes.txt").write_text("mine")
    about = make_codes(folder, "cooccurrence", size=8, **SMALL)
    dataset = RecDataset.load(folder)
    assert dataset.catalogue.item_ids == PLAIN.item_ids
    assert dataset.train == DATA.train
    assert (folder / "notes.txt").read_text() == "mine"
    assert about["catalogue"] == dataset.catalogue.digest()
    assert json.loads((folder / "sids/sids.json").read_text()) == about
    assert read_codes(folder / "sids/sid.index.json", PLAIN.item_ids) == dataset.catalogue.sids
    assert Codebooks.load(folder / "sids/codebooks.safetensors").levels == 2
    processor = RecProcessor(build_tokenizer(dataset.catalogue, "sid"), dataset.catalogue, "sid")
    assert len(processor.item_codec) == len(PLAIN)


def test_codes_are_replaced_only_when_told_to(folder):
    make_codes(folder, "tfidf", size=8, **SMALL)
    before = RecDataset.load(folder).catalogue.sids
    with pytest.raises(ValueError, match=r"overwrite: expected true to replace the semantic IDs of .*data, got false"):
        make_codes(folder, "tfidf", size=8, seed=1, **SMALL)
    assert RecDataset.load(folder).catalogue.sids == before
    make_codes(folder, "tfidf", size=8, seed=1, overwrite=True, **SMALL)
    assert RecDataset.load(folder).catalogue.sids != before


def test_codes_of_others(folder, tmp_path):
    codes = np.arange(2 * len(PLAIN)).reshape(2, -1) % 5
    np.save(tmp_path / "codes.npy", codes)
    about = import_codes(folder, tmp_path / "codes.npy")
    assert RecDataset.load(folder).catalogue.sids[3] == (f"<a_{codes[0, 3]}>", f"<b_{codes[1, 3]}>")
    assert about["method"] == "file"
    assert about["report"]["largest_group"] > 1
    assert not (folder / "sids/codebooks.safetensors").exists()
    with pytest.raises(ValueError, match=r"update: expected codebooks in .*, got codes that were read from a file"):
        update_codes(folder)


def grown(count: int) -> Catalogue:
    """The first ``count`` items in another order, so that a code is found by its item and not by its place."""
    order = list(range(count))[::-1]
    return Catalogue([PLAIN.item_ids[i] for i in order], [PLAIN.titles[i] for i in order])


def embeddings(catalogue: Catalogue, path, noise: float = 0.0):
    """A file of embeddings that depend on the item alone, and on ``noise``."""
    rows = []
    for item_id in catalogue.item_ids:
        rng = np.random.default_rng(PLAIN.index(item_id))
        rows.append(rng.normal(size=6) + noise * rng.normal(size=6))
    np.save(path, np.array(rows, np.float32))
    return str(path)


def test_new_items_are_encoded_and_old_codes_stay(tmp_path):
    none = Interactions([], [], [])
    few, more = grown(30), grown(40)
    RecDataset(few, none, none, none).save(tmp_path / "old")
    make_codes(tmp_path / "old", embeddings(few, tmp_path / "few.npy"), **SMALL)
    old = RecDataset.load(tmp_path / "old").catalogue
    RecDataset(more, none, none, none).save(tmp_path / "new")
    known = {"codebooks": tmp_path / "old/sids", "progress": False}
    with pytest.raises(ValueError, match=r"embed: expected the .npy file with rows for the new items too, got none"):
        update_codes(tmp_path / "new", **known)
    with pytest.raises(ValueError, match=r"embed: expected the embeddings of .* keep their codes, got"):
        update_codes(tmp_path / "new", source=embeddings(more, tmp_path / "bad.npy", noise=1.0), **known)
    with pytest.raises(
        ValueError, match="embed: expected the source that the codebooks were made from, got one of kind"
    ):
        update_codes(tmp_path / "new", source="tfidf", **known)
    about = update_codes(tmp_path / "new", source=embeddings(more, tmp_path / "more.npy"), **known)
    new = RecDataset.load(tmp_path / "new").catalogue
    assert about["report"]["new_items"] == 10
    assert [new.sids[new.index(item_id)] for item_id in old.item_ids] == old.sids
    again = update_codes(tmp_path / "new", source=str(tmp_path / "more.npy"), progress=False)
    assert again["report"]["new_items"] == 0
    assert RecDataset.load(tmp_path / "new").catalogue == new


def test_a_space_that_moves_with_the_items_is_not_continued(folder):
    make_codes(folder, "tfidf", size=8, **SMALL)
    with pytest.raises(
        ValueError, match=r"update: expected codebooks of a language model or a file, .* got those of tfidf"
    ):
        update_codes(folder)


def test_damaged_codebooks_are_refused(folder, tmp_path):
    make_codes(folder, embeddings(PLAIN, tmp_path / "x.npy"), **SMALL)
    file = folder / "sids/codebooks.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"codebooks.safetensors: expected the file that was saved with sids.json"):
        update_codes(folder, source=str(tmp_path / "x.npy"))


@pytest.mark.parametrize("moment", ["before", "during", "gone"])
@pytest.mark.parametrize("command", ["make", "import", "update"])
def test_a_folder_that_changed_meanwhile_is_refused(tmp_path, monkeypatch, command, moment):
    folder = prepared(tmp_path / "data")
    np.save(tmp_path / "codes.npy", np.arange(2 * len(PLAIN)).reshape(2, -1) % 5)
    embeddings(PLAIN, tmp_path / "e.npy")
    if command == "update":
        make_codes(folder, str(tmp_path / "e.npy"), **SMALL)
    catalogue = RecDataset.load(folder).catalogue
    other = RecDataset(catalogue, DATA.train, DATA.valid.select([]), DATA.test, "other")

    def change():
        shutil.rmtree(folder) if moment == "gone" else other.save(folder)

    copy = shutil.copytree

    def changing(*args, **kwargs):
        if moment != "during":
            change()
        copy(*args, **kwargs)
        if moment == "during":
            change()

    monkeypatch.setattr("shutil.copytree", changing)
    work = {
        "make": lambda: make_codes(folder, "cooccurrence", size=8, **SMALL),
        "import": lambda: import_codes(folder, tmp_path / "codes.npy"),
        "update": lambda: update_codes(folder, source=str(tmp_path / "e.npy"), progress=False),
    }[command]
    with pytest.raises(ValueError, match=r"^data: expected the folder that was read, got one that changed meanwhile$"):
        work()
    assert os.listdir(tmp_path).count("data") == (moment != "gone")
    if moment != "gone":
        assert RecDataset.load(folder).name == "other"
        assert RecDataset.load(folder).catalogue == catalogue
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    outcomes = set()
    for number in range(1, 200):
        folder = prepared(tmp_path / f"data{number}")
        np.save(codes := tmp_path / "codes.npy", np.arange(len(PLAIN))[None] % 7)

        def work(number=number, folder=folder, codes=codes):
            kill_at(number, tmp_path)
            import_codes(folder, codes)

        status = in_child(work)
        if not folder.exists():  # between two renames: the next call puts it back
            outcomes.add("aside")
            import_codes(folder, codes)
        found = RecDataset.load(folder).catalogue
        assert found.sids is None or (folder / "sids/sids.json").exists()
        outcomes.add("old" if found.sids is None else "new")
        if status == 0:
            break
    assert status == 0
    assert {"old", "new"} <= outcomes


def test_the_command(folder, tmp_path, capsys):
    line = ["sids", "--data", str(folder), "--levels", "2", "--codes", "8", "--embed_size", "8"]
    assert main([*line, "--embed", "cooccurrence", "--iterations", "4", "--json"]) == 0
    out = capsys.readouterr()
    about = json.loads(out.out)
    assert about["report"]["items"] == len(PLAIN)
    assert "level 2: 8 codes used (100%)" in out.err
    assert main([*line, "--embed", "tfidf", "--method", "rq-vae", "--epochs", "3", "--overwrite", "true"]) == 0
    assert main(["sids", "--data", str(folder), "--codes_from", str(folder / "sids/sid.index.json")]) == 1
    assert "overwrite: expected true" in capsys.readouterr().err
    os.rename(folder / "sids/sid.index.json", tmp_path / "sid.index.json")
    line = ["sids", "--data", str(folder), "--codes_from", str(tmp_path / "sid.index.json"), "--overwrite", "true"]
    assert main(line) == 0
    assert not (folder / "sids/codebooks.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "data: expected a folder that flr prepare wrote, got none"),
        ("--data {tmp} --embed tfidf", "data: expected a folder that flr prepare wrote, got {tmp}"),
        ("--data {data}", "embed: expected a language model, tfidf, cooccurrence or FILE.npy, got none"),
        ("--data {data} --embed tfidf --method pq", "method: expected one of rq-kmeans, rq-vae, got 'pq'"),
        ("--data {data} --embed tfidf --codes 8 --levels 27", "levels: expected None or an integer from 1 to 26"),
        ("--data {data} --embed tfidf --device gpu", "device: expected auto or a device of this machine, got 'gpu'"),
        (
            "--data {data} --embed {tmp}/absent --codes 8",
            "directory: expected a folder with config.json or a model on the Hub",
        ),
        ("--data {data} --embed tfidf --codes_from x.npy", "codes_from: expected neither embed nor update beside it"),
        ("--data {data} --codes_from x.txt", "path: expected a file of codes at x.txt, got none"),
        ("--data {data} --codebooks x", "codebooks: expected update true beside it, got x"),
        ("--data {data} --update true", "codebooks: expected a folder sids/ of flr sids, got {data}/sids"),
    ],
)
def test_mistakes(words, message, folder, tmp_path, capsys):
    places = {"tmp": tmp_path, "data": folder}
    assert main(["sids", *(word.format(**places) for word in words.split())]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"flr sids: {message.format(**places)}")
    assert RecDataset.load(folder).catalogue.sids is None
