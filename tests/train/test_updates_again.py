"""``flr update`` called again: after a kill, for the same update, and for another one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from flr.cli import main
from flr.data import Catalogue, Interactions, RecDataset, RecProcessor
from flr.recommend import Recommender
from flr.train import UpdateConfig, updates
from flr.train.run_folder import MARKS
from tests.helpers.kills import in_child, kill_at
from tests.helpers.updates import SFT, UPDATE, same, split, twice, updated, weights


def measured_splits(folder) -> set[str]:
    """Of which splits the model's card has metrics."""
    return {result.dataset_split for result in ModelCard.load(folder / "README.md").data.eval_results or ()}


def test_a_kill_at_any_change_of_files_ends_at_the_same_weights(models, tmp_path):
    """In place: at every moment the folder holds the old model, the new one, or is refused."""

    def attempt(folder, kill=0, where=None):
        def run():
            torch.set_num_threads(1)
            if kill:
                kill_at(kill, where)
            options = ["--data", str(models / "new"), "--replay", str(models / "old"), "--card", "false"]
            return main(["update", "--model", str(folder), *options, *SFT, *UPDATE])

        return in_child(run)

    quiet, cut = tmp_path / "quiet" / "model", tmp_path / "cut" / "model"
    for folder in (quiet, cut):
        shutil.copytree(models / "id", folder)
    assert attempt(quiet) == 0
    wanted, old = weights(quiet), weights(cut)
    assert not same(wanted, old)

    def state():
        if not all((cut / name).is_file() for name in MARKS):
            with pytest.raises((ValueError, OSError)):
                RecProcessor.from_pretrained(cut)
            return "refused"
        RecProcessor.from_pretrained(cut)
        return "old" if same(weights(cut), old) else "new" if same(weights(cut), wanted) else "other"

    for kill in (4, 60, 95):  # before, while and after it learns
        assert attempt(cut, kill, cut.parent) == -9
        assert state() == "old"
    seen = []
    while attempt(cut, 2 * len(seen) + 1, cut) == -9:  # while the files are moved
        seen.append(state())
    assert set(seen) == {"old", "refused", "new"}, seen
    assert same(weights(cut), wanted)
    assert sorted(path.name for path in cut.parent.iterdir()) == ["model"]  # nothing stays behind


def asked(dataset, replay=None, share=0.5, since=None, more=None, **options) -> dict:
    """By what a call is known again."""
    args = UpdateConfig(use_cpu=True, **{"max_steps": 6, **options})
    job = updates._Job("m", None, Path("out"), Path("work"), args, dataset, replay, share, since, print, more or {})
    return job.asked


def test_a_call_with_anything_else_to_learn_or_to_learn_by_is_another_update():
    old, new = split()
    train, valid, test = new.train, new.valid, new.test

    def of(train=train, valid=valid, catalogue=new.catalogue):
        return RecDataset(catalogue, train, valid, test, "new")

    items = new.catalogue
    titles = Catalogue(items.item_ids, [*items.titles[:-1], "another"], items.sids)
    later = Interactions(train.users, train.histories, train.targets, train.timestamps + 1)
    plain = asked(new, old)
    assert asked(of(), old, logging_steps=7, output_dir="there", per_device_eval_batch_size=3) == plain
    others = [
        asked(of(train.select(np.arange(len(train) - 1))), old), asked(of(valid=valid.select([0])), old),
        asked(of(later), old), asked(of(catalogue=titles), old), asked(new), asked(new, of(valid.select([0, 1, 2]))),
        asked(new, old, share=0.25), asked(new, old, since=9.0), asked(new, old, more={"augment_reverse": 0.5}),
        *(asked(new, old, **{name: value}) for name, value in (
            ("seed", 1), ("max_steps", 5), ("learning_rate", 1.0), ("num_train_epochs", 2), ("eval_max_users", 3),
            ("eval_num_beams", 3), ("rl_steps", 2), ("per_device_train_batch_size", 3))),
    ]  # fmt: skip
    assert len({json.dumps(found) for found in (plain, *others)}) == 1 + len(others)


def test_what_is_left_of_another_update_is_no_part_of_this_one(models, tmp_path, monkeypatch):
    work, seen = tmp_path / ".out.update", []
    names = ("before", "after", "run", "rl", "reinforced", "kept")
    for name in names:
        (work / name).mkdir(parents=True)
        (work / name / "metrics.json").write_text("{}")
    (work / "settings.json").write_text('{"asked": "something else"}')

    def stop(seed):
        seen.extend(sorted(path.name for path in work.iterdir()))
        raise ValueError(f"stop: {seed}")

    monkeypatch.setattr(updates, "set_seed", stop)
    assert updated(models, "id", tmp_path, "--seed", "4") == (1, {})
    assert seen == [".lock", "settings.json"]
    assert not work.exists()  # there is nothing to go on from


@pytest.fixture(scope="module")
def cut(models, tmp_path_factory):
    """An update of the model of ids, whose files could not be moved, and the weights that it has learned."""
    folder = tmp_path_factory.mktemp("cut")

    def full(*_):
        raise OSError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "decide", lambda *_: (True, "kept: a test says so", {}))
        patch.setattr(updates._Job, "_publish", full)
        assert updated(models, "id", folder, "--max_steps", "2", "--card", "false") == (1, {})
    return folder, weights(folder / ".out.update" / "kept")


@pytest.mark.parametrize("case", ["same", "rows", "model", "damaged", "output"])
def test_a_finished_update_is_moved_where_it_is_the_one_that_is_asked_for(
    models, cut, case, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(updates, "decide", lambda *_: (True, "kept: a test says so", {}))
    shutil.copytree(cut[0], tmp_path, dirs_exist_ok=True)
    more, model, rest = ["--max_steps", "2"], models / "id", tmp_path / "out" / "model-00001-of-00002.safetensors"
    if case == "rows":
        more += ["--replay_share", "0.3"]
    if case == "model":
        model = shutil.copytree(model, tmp_path / "other")
        twice(model)
    if case == "damaged":
        with open(tmp_path / ".out.update" / "kept" / "model.safetensors", "r+b") as file:
            file.truncate(1000)
    if case == "output":  # somebody has put a model there since
        shutil.copytree(model, tmp_path / "out")
        rest.write_bytes(b"of a larger one")
    assert updated(models, "id", tmp_path, *more, model=model)[0] == 0
    assert ("The update was finished before" in capsys.readouterr().err) == (case == "same")
    assert same(weights(tmp_path / "out"), cut[1]) == (case in ("same", "damaged", "output"))
    assert "flr update" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / ".out.update").exists()
    assert not rest.exists()
    if case == "model":  # what is there now is of the other one
        assert updated(models, "id", tmp_path, *more)[0] == 0
        assert same(weights(tmp_path / "out"), cut[1])


def test_the_same_update_is_done_once_and_a_reload_finds_it(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flr.train.updates.decide", lambda *_: (True, "kept: a test says so", {}))
    model = tmp_path / "model"
    shutil.copytree(models / "id", model)
    served = Recommender.from_pretrained(model, "cpu")
    options = ["--model", str(model), "--data", str(models / "new"), *SFT, *UPDATE]
    assert main(["update", *options]) == 0
    assert "no old rows beside the new ones" in capsys.readouterr().err.lower()
    learned = weights(model)
    again = Recommender.from_pretrained(model, "cpu", like=served.processor)
    assert {"item_58", "item_59"} <= {x.item_id for x in again.recommend([["item_58"]], k=60)[0]}
    assert "flr update" in (model / "README.md").read_text()
    assert main(["update", *options]) == 0
    assert "has learned these rows before; nothing to do" in capsys.readouterr().err
    assert same(weights(model), learned)
    assert measured_splits(model) == {"valid"}
    old = ["evaluate", "--model", str(model), "--data", str(models / "new"), "--split", "train"]
    for other in (["--seed", "7"], ["--augment_reverse", "0.9"], ["--dtype", "bfloat16"]):  # another update
        assert main(old) == 0
        assert "train" in measured_splits(model)
        card = other[0] != "--seed"
        assert main(["update", *options, *other, "--card", str(card)]) == 0
        assert measured_splits(model) == ({"valid"} if card else set())  # not those of other weights
        assert "has learned these rows before" not in capsys.readouterr().err
        assert not same(weights(model), learned)
        learned = weights(model)
