"""``flr update``: a model of every kind takes in new rows and items, whole or not at all, if it is not worse."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
from safetensors.torch import save_file

import flr.data
from flr.cli import main
from flr.cli.update import NOT_KEPT
from flr.data import Catalogue, Interactions, NeighbourTable, RecDataset, RecProcessor
from flr.data.growth import grow_catalogue
from flr.files import exclusive_folder
from flr.model.checkpoint import load_from
from flr.model.vocabulary import grow
from flr.train import SFTTrainer, init_grown_tokens, updates
from scripts.stream_study import over_used_items
from tests.helpers.kills import killed_inside
from tests.helpers.updates import SFT, SMALL, UPDATE, WHOLE, answering, catalogue, same, split, updated, weights


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
    old, new = split()
    plain = (Interactions(part.users, part.histories, part.targets) for part in (old.train, old.valid, old.test))
    RecDataset(old.catalogue, *plain, "timeless").save(tmp_path / "timeless")
    more += ["--replay", str(tmp_path / "timeless")]
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
    assert seen["fresh"].timestamps.tolist() == new.train.timestamps.tolist()  # which the replay has not
    assert [after is found[2] for after, found in zip(seen["decided"], seen["ranked"][1:], strict=True)] == [True] * 2
    assert record["facts"]["ndcg@10"]["all"]["rows"] == 2  # of the second decision
    assert record["asked"]["more"] == {"augment_reverse": 0.3, "teacher": "item-knn", "dtype": "bfloat16"}


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
