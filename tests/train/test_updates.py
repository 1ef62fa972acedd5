"""``flr update``: a model of every kind takes in new rows and items, whole or not at all, if it is not worse."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import flr.data
from flr.cli import main
from flr.cli.update import NOT_KEPT
from flr.data import Catalogue, Interactions, NeighbourTable, RecDataset, RecProcessor
from flr.data.growth import grow_catalogue
from flr.files import exclusive_folder
from flr.model.checkpoint import load_from
from flr.model.vocabulary import grow
from flr.recommend import Recommender
from flr.train import SFTTrainer, UpdateConfig, init_grown_tokens, updates
from flr.train.run_folder import MARKS
from scripts.stream_study import over_used_items
from tests.helpers.kills import in_child, kill_at, killed_inside
from tests.helpers.updates import SFT, SMALL, UPDATE, WHOLE, answering, catalogue, same, split, twice, updated, weights


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
def test_a_model_takes_in_new_items_and_known_ones_keep_their_tokens(models, codec, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flr.train.updates.decide", lambda *_: (True, "kept: a test says so", {}))
    assert updated(models, codec, tmp_path)[0] == 0
    assert "9 new items" in capsys.readouterr().out
    old, new = (RecProcessor.from_pretrained(folder) for folder in (models / codec, tmp_path / "out"))
    size = len(old.catalogue)
    assert new.catalogue.item_ids[:size] == old.catalogue.item_ids
    assert sorted(new.catalogue.item_ids) == sorted(WHOLE.catalogue.item_ids)
    assert [new.item_codec.encode(i) for i in range(size)] == [old.item_codec.encode(i) for i in range(size)]
    vocabulary = new.tokenizer.get_vocab()
    assert {name: vocabulary[name] for name in old.tokenizer.get_vocab()} == old.tokenizer.get_vocab()
    (tmp_path / "out" / "item_tokens.safetensors").unlink()  # the codec is built again, as it was
    assert np.array_equal(RecProcessor.from_pretrained(tmp_path / "out").item_codec.tokens, new.item_codec.tokens)
    model, _ = load_from(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] >= len(new.tokenizer)
    assert main(["recommend", "--model", str(tmp_path / "out"), "--history", "item_55"]) == 0
    where = ["--data", str(models / "new"), "--split", "valid"]  # whose items stand in another order
    assert main(["evaluate", "--model", str(tmp_path / "out"), *where]) == 0
    assert main(["evaluate", "--model", str(models / codec), *where]) == 1
    assert "was trained on, or items of it, got 'item_" in capsys.readouterr().err


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
    assert not (tmp_path / ".out.update").exists()
    assert not rest.exists()
    if case == "model":  # what is there now is of the other one
        assert updated(models, "id", tmp_path, *more)[0] == 0
        assert same(weights(tmp_path / "out"), cut[1])


def test_two_processes_do_not_update_one_model(models, tmp_path, capsys):
    def hold(stay):
        with exclusive_folder(tmp_path / ".out.update"):
            stay()

    def meanwhile(child):
        assert updated(models, "id", tmp_path) == (1, {})
        assert (
            f"no other run writes to, got {tmp_path / '.out.update'}, which process {child}" in capsys.readouterr().err
        )

    assert killed_inside(hold, meanwhile) == -signal.SIGKILL


def test_an_update_that_is_worse_changes_nothing_and_says_so(models, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(models / "sid", model)
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    options = ["--data", str(models / "new"), "--replay_share", "0", *SFT, *UPDATE, "--learning_rate", "1", "--json"]
    assert main(["update", "--model", str(model), *options]) == NOT_KEPT
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] is False
    assert found["output_dir"] is None
    assert found["replay_rows"] == 0
    assert found["why"].startswith("not kept: NDCG@10 of the 27 newest rows with known targets changed by -")
    assert found["ndcg@10"]["known"]["difference"][2] < 0
    assert found["ndcg@10"]["new"]["before"] == 0
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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


def test_the_run_that_a_model_is_of_ends_with_its_update(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flr.train.updates.decide", lambda *_: (True, "kept: a test says so", {}))
    model = tmp_path / "model"
    run = ["sft", "--data", str(models / "old"), "--output_dir", str(model), *SFT, *SMALL, "--max_steps", "2"]
    run += ["--codec", "id", "--variant", "anchor"]
    update = ["update", "--model", str(model), "--data", str(models / "new"), *SFT, *UPDATE]
    assert main(run) == main(update) == main(["report", str(model)]) == 0
    assert "finished; its model was updated since" in (model / "report.html").read_text()
    learned = weights(model)
    assert main(run) == 1  # neither the end of that run nor a place to put it
    assert "output_dir: expected a folder whose model is no update's" in capsys.readouterr().err
    assert same(weights(model), learned)
    assert main([*run, "--overwrite_output_dir", "true"]) == 0
    assert main(update) == 0  # whose rows the new model has not learned
    assert "has learned these rows before" not in capsys.readouterr().err
    assert same(weights(model), learned)
    save_file({name: 2 * tensor for name, tensor in learned.items()}, model / "model.safetensors", {"format": "pt"})
    assert main(update) == 0  # nor this one
    assert "has learned these rows before" not in capsys.readouterr().err


def test_what_cannot_be_updated_is_refused(models, tmp_path, capsys):
    old, new = split()
    parts = (new.train, new.valid, new.test)

    def refused(expected: str, catalogue=None, dataset=None, codec="sid", more=()):
        data = dataset or RecDataset(catalogue or new.catalogue, *parts, "other")
        data.save(tmp_path / "data")
        options = ["--model", str(models / codec), "--data", str(tmp_path / "data"), *SFT, *UPDATE, *more]
        assert main(["update", *options]) == 1
        assert expected in capsys.readouterr().err
        assert not (models / f".{codec}.update").exists()

    items = new.catalogue
    without = Catalogue(items.item_ids, items.titles)
    refused("data: expected semantic IDs for its new items, by the codebooks of the known ones", without)
    changed = [
        ("<a_9>", "<b_9>", "<c_9>") if i == "item_3" else sid for i, sid in zip(items.item_ids, items.sids, strict=True)
    ]
    refused("of the model for item 'item_3'", Catalogue(items.item_ids, items.titles, changed))
    empty = RecDataset(items, new.train, new.valid.select([]), new.test, "other")
    refused("data: expected new rows to learn (train) and newer ones that decide (valid), got", dataset=empty)
    refused("got 0 and 40", more=["--since", "2100-01-01"])
    timeless = RecDataset(items, *(Interactions(p.users, p.histories, p.targets) for p in parts), "other")
    refused("since: expected rows with times, got none", dataset=timeless, more=["--since", "2017-01-01"])
    refused("since: expected an ISO date (2015-01-01) or seconds since 1970, got '2017'", more=["--since", "2017"])
    refused("replay_share: expected a number in [0, 1), got 1.0", more=["--replay_share", "1"])
    refused("held_back: expected 0 for an update", more=["--held_back", "0.1"])
    refused("eval_strategy: expected 'no', got 'epoch'", more=["--eval_strategy", "epoch"])
    WHOLE.save(tmp_path / "replay")
    few = over_used_items("few", catalogue(), old.train.select(np.arange(5)), old.valid.select(np.arange(2)))
    refused("replay: expected rows over items of the model or of data, got 'item_43' and 8 others",
            dataset=few, more=["--replay", str(tmp_path / "replay")])  # fmt: skip
    assert main(["update", "--model", "nobody/nothing", "--data", str(models / "new"), *SFT]) == 1
    assert "output_dir: expected a folder for the updated model, got none for 'nobody/nothing'" in (
        capsys.readouterr().err
    )
    assert main(["update", "--model", str(models / "id")]) == 1
    assert "data: expected a prepared folder, got None" in capsys.readouterr().err


def test_an_adapter_learns_new_titles_and_refuses_new_tokens(models, tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("flr.train.updates.decide", lambda *_: (True, "kept: a test says so", {}))
    lora = ["--lora_rank", "2", *SFT, "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no",
            "--load_best_model_at_end", "false"]  # fmt: skip
    for codec in ("id", "title"):
        out = ["--data", str(models / "old"), "--codec", codec, "--output_dir", str(tmp_path / codec)]
        assert main(["sft", "--model", str(models / codec), *out, *lora]) == 0
    capsys.readouterr()
    assert updated(models, "id", tmp_path, model=tmp_path / "id")[0] == 1
    assert "model: expected a whole model (flr merge makes one), whose token table can grow by 9" in (
        capsys.readouterr().err
    )
    assert updated(models, "title", tmp_path, model=tmp_path / "title")[0] == 1  # <|same_0|> to <|same_2|>
    assert "can grow by 3 for new items" in capsys.readouterr().err
    new = split()[1]
    known = set(split()[0].catalogue.item_ids[20:])
    named = zip(new.catalogue.item_ids, new.catalogue.titles, strict=True)
    titles = [title if item_id in known else f"{title} {item_id}" for item_id, title in named]
    plain = Catalogue(new.catalogue.item_ids, titles, new.catalogue.sids)
    RecDataset(plain, new.train, new.valid, new.test, "plain").save(tmp_path / "plain")
    more = ["--data", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "out")]
    assert main(["update", "--model", str(tmp_path / "title"), *more, *SFT, *UPDATE]) == 0
    assert updates._weights(tmp_path / "out").keys() == {"adapter_model.safetensors"}
    assert "20 items have another title in the data and keep theirs" in capsys.readouterr().err
    assert main(["recommend", "--model", str(tmp_path / "out"), "--history", "item_55"]) == 0


def test_every_part_of_an_update_gets_its_options(models, tmp_path, monkeypatch):
    model = shutil.copytree(models / "sid", tmp_path / "model")
    config = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps(config | {"scoring": "catalogue"}))
    seen = {"ranked": [], "decided": [], "formats": []}
    load_dataset, stream, evaluate, load_from, reinforce = (
        flr.data.load_dataset, updates.stream, updates.evaluate, updates.load_from, updates.reinforce
    )  # fmt: skip

    def loads(folder, form):
        seen["formats"].append(form)
        return load_dataset(folder, form)

    def streams(*args, **limits):
        seen["limits"], seen["rows"] = limits, stream(*args, **limits)
        return seen["rows"]

    def ranks(*args, **options):
        seen["ranked"].append((options["output_dir"].name, options["num_beams"], evaluate(*args, **options)))
        return seen["ranked"][-1][2]

    def loaded(*args, **options):
        seen["loading"] = options
        return load_from(*args, **options)

    class Watched(SFTTrainer):
        def __init__(self, model, args, processor, train, valid, changes):
            seen.update(args=args, changes=changes)
            super().__init__(model, args, processor, train, valid, changes)

    def reinforces(model, processor, fresh, *more):
        seen["fresh"] = fresh
        return reinforce(model, processor, fresh, *more)

    def decide(before, after, known):
        seen["decided"].append(after)
        figures = {"rows": len(seen["decided"]), "before": 0.0, "after": 0.0, "difference": [0.0] * 4}
        return True, "kept: a test says so", {"all": figures}

    monkeypatch.setattr(flr.data, "load_dataset", loads)
    for name, put in (("stream", streams), ("evaluate", ranks), ("load_from", loaded), ("SFTTrainer", Watched),
                      ("reinforce", reinforces), ("decide", decide)):  # fmt: skip
        monkeypatch.setattr(updates, name, put)
    monkeypatch.setattr("flr.train.update_rl.decide", answering(True, True))
    more = [
        "--seed",
        "5",
        "--eval_max_users",
        "20",
        "--since",
        "1970-01-02",
        "--eval_num_beams",
        "7",
        "--dtype",
        "bfloat16",
    ]
    more += ["--num_train_epochs", "0.3", "--max_steps", "1000", "--gradient_accumulation_steps", "3"]
    more += ["--replay_share", "0.25", "--augment_reverse", "0.3", "--teacher", "item-knn", "--revision", "main"]
    more += ["--rl_steps", "1", "--rl_group_size", "2", "--data_format", "prepared", "--dtype", "bfloat16"]
    status, record = updated(models, "sid", tmp_path, *more, model=model)
    assert status == 0
    rows = seen["rows"]
    assert seen["formats"] == ["prepared"] * 2
    assert seen["limits"] == {"share": 0.25, "since": 86400.0, "seed": 5, "valid_rows": 20}
    assert [found[:2] for found in seen["ranked"]] == [(name, 7) for name in ("before", "after", "reinforced")]
    assert (seen["loading"]["revision"], seen["loading"]["dtype"]) == ("main", "bfloat16")
    assert record["facts"]["steps"] == seen["args"].max_steps == math.ceil(0.3 * len(rows.train) / 48) == 3
    assert seen["args"].normalisation == "catalogue"
    assert seen["changes"].reverse == 0.3
    assert len(seen["changes"].teacher.left_out.train) == len(rows.everything) > len(rows.train)
    assert len(seen["fresh"]) == rows.new_rows < len(rows.train)
    assert [after is found[2] for after, found in zip(seen["decided"], seen["ranked"][1:], strict=True)] == [True] * 2
    assert record["facts"]["ndcg@10"]["all"]["rows"] == 2  # of the second decision


def test_new_rows_of_a_model_begin_with_what_is_known(models):
    known = RecProcessor.from_pretrained(models / "id")
    items = grow_catalogue(known.catalogue, split()[1].catalogue).catalogue
    grown = known.grown(items)
    (model, _), (wanted, _) = load_from(models / "id"), load_from(models / "id")
    assert updates.grow_model(model, known, grown) == []
    grow(wanted, len(grown.tokenizer))
    init_grown_tokens(wanted, grown, len(known.tokenizer))
    assert same(model.state_dict(), wanted.state_dict())
    new = model.get_input_embeddings().weight[len(known.tokenizer) : len(grown.tokenizer)]
    assert len(new.unique(dim=0)) > 1  # not one mean for all
    grown.item_knn = NeighbourTable.fit(WHOLE.train, len(items))
    (line,) = updates.grow_model(model, known, grown)
    assert line.startswith("The table of flr neighbours says nothing of the new items")
    assert updates.grow_model(model, grown, grown) == []
