"""``flr update``: a model of every kind takes in new rows and items, whole or not at all, if it is not worse."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from flr.cli import main
from flr.cli.update import NOT_KEPT
from flr.data import Catalogue, Interactions, RecDataset, RecProcessor, planted_dataset
from flr.data.growth import joined, replaced
from flr.model.checkpoint import load_from
from flr.recommend import Recommender
from flr.train import LatentGRPOTrainer
from flr.train.run_folder import MARKS
from scripts.stream_study import by_time, over_used_items
from tests.helpers.kills import in_child, kill_at

WHOLE = planted_dataset(num_items=60, num_users=80, split="time", seed=2)
SFT = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "3e-3"]
SMALL = ["--hidden_size", "32", "--intermediate_size", "32", "--max_steps", "40", "--eval_strategy", "no"]
SMALL += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--per_device_train_batch_size", "32"]
UPDATE = ["--max_steps", "6", "--per_device_train_batch_size", "16", "--save_steps", "2"]


def catalogue():
    """Of the last eight items, which come later, two share title and codes with a known one that was alone in both."""
    whole = WHOLE.catalogue
    twins = [5 if item in (55, 57) else item for item in range(len(whole))]
    titles = [whole.titles[item] for item in twins]
    return Catalogue(whole.item_ids, titles, [whole.sids[item] for item in twins])


def split():
    """Old rows over their items; new rows over theirs, in another order: eight are new, some are absent."""
    rows = by_time(joined(joined(WHOLE.train, WHOLE.valid), WHOLE.test))
    late = rows.targets >= 52
    late |= np.array([(row.history >= 52).any() for row in rows])
    old, new = rows.select(~late), rows.select(late)
    learned, newest = new.select(np.arange(len(new) - 40)), new.select(np.arange(len(new) - 40, len(new)))
    known = over_used_items("old", catalogue(), old, old.select(np.arange(9)))
    later = over_used_items("new", catalogue(), learned, newest)
    order = np.random.default_rng(0).permutation(len(later.catalogue))
    items = later.catalogue
    mixed = Catalogue(*([column[item] for item in order] for column in (items.item_ids, items.titles, items.sids)))
    places = np.argsort(order)
    parts = [replaced(part, places) for part in (later.train, later.valid, later.test)]
    return known, RecDataset(mixed, *parts, "new")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    old, new = split()
    old.save(folder / "old")
    new.save(folder / "new")
    return folder


@pytest.fixture(scope="module")
def models(data):
    """A model by codec; the one of titles has a thought without factors, the one of ids a control."""
    for codec, variant in (("id", "anchor"), ("sid", "flr"), ("title", "none")):
        more = ["--codec", codec, "--variant", variant, "--num_factors", "2", "--anchor", "last", "--vocab_size", "300"]
        folder = ["--data", str(data / "old"), "--output_dir", str(data / codec)]
        assert main(["sft", *folder, *SFT, *SMALL, *more]) == 0
    return data


def updated(models, codec: str, tmp_path, *more: str, model=None) -> tuple[int, dict]:
    out = tmp_path / "out"
    options = ["--data", str(models / "new"), "--replay", str(models / "old"), "--output_dir", str(out)]
    model = str(models / codec if model is None else model)
    status = main(["update", "--model", model, *options, *SFT, *UPDATE, *more])
    return status, json.loads((out / "flr_update.json").read_text()) if out.is_dir() else {}


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


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def measured_splits(folder) -> set[str]:
    """Of which splits the model's card has metrics."""
    return {result.dataset_split for result in ModelCard.load(folder / "README.md").data.eval_results or ()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "20 items have another title in the data and keep theirs" in capsys.readouterr().err
    assert main(["recommend", "--model", str(tmp_path / "out"), "--history", "item_55"]) == 0


RL = ["--rl_steps", "3", "--rl_group_size", "4", "--rl_learning_rate", "1e-2"]


def answering(*answers):
    """In place of ``decide``: these answers, one a call."""
    kept = iter(answers)
    figures = {"all": {"difference": [0.0, 0.0, 0.0, 0.0]}}
    return lambda *_: (found := next(kept), f"{'kept' if found else 'not kept'}: a test says so", figures)


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ([True, True], True),
        ([False], False),  # worse than the supervised model
        ([True, False], False),  # no worse than that, and worse than the model before the update
    ],
)
def test_reinforcement_moves_the_reasoner_alone_and_goes_where_it_is_worse(
    models, tmp_path, capsys, monkeypatch, answers, kept
):
    monkeypatch.setattr("flr.train.updates.decide", lambda *_: (True, "kept: a test says so", {}))
    assert updated(models, "sid", tmp_path)[0] == 0
    supervised = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("flr.train.update_rl.decide", answering(*answers))
    capsys.readouterr()
    status, record = updated(models, "sid", tmp_path, *RL)
    assert status == 0
    rl = record["facts"]["rl"]
    assert (rl["kept"], rl["steps"], rl["rows"]) == (kept, 3, 48)
    assert rl["why"].startswith("kept" if kept else "not kept")
    assert f"Reinforcement, 3 steps on 48 rows: {rl['why']}." in capsys.readouterr().out
    found = weights(tmp_path / "out")
    moved = {name for name in found if not torch.equal(found[name], supervised[name])}
    assert found.keys() == supervised.keys()
    assert bool(moved) == kept
    assert all(".flr." in f".{name}" for name in moved)


def test_reinforcement_takes_the_newest_rows_and_is_compared_on_all_that_decide(models, tmp_path, monkeypatch):
    """Without a replaced decision: two steps at a small rate change nothing beyond chance."""
    seen = []

    class Watched(LatentGRPOTrainer):
        def __init__(self, model, args, processor, train, *more):
            seen.append((args, train))
            super().__init__(model, args, processor, train, *more)

    monkeypatch.setattr("flr.train.update_rl.LatentGRPOTrainer", Watched)
    more = ["--max_steps", "30", "--rl_steps", "2", "--rl_learning_rate", "1e-6", "--rl_likelihood_weight", "0.4"]
    status, record = updated(models, "sid", tmp_path, *more)
    assert status == 0
    assert record["facts"]["rl"]["kept"]
    assert record["facts"]["rl"]["ndcg@10"]["rows"] == 40
    ((args, train),) = seen
    assert (args.is_hybrid, args.likelihood_weight, args.reward, args.max_steps) == (True, 0.4, "ndcg@10", 2)
    assert sorted(train.timestamps) == sorted(split()[1].train.timestamps)[-32:]


def test_a_likelihood_is_a_reward_whatever_the_beams_of_the_evaluation(models, tmp_path, monkeypatch):
    monkeypatch.setattr("flr.train.updates.decide", lambda *_: (True, "kept: a test says so", {}))
    status, record = updated(models, "sid", tmp_path, *RL, "--rl_reward", "log_likelihood", "--eval_num_beams", "8")
    assert status == 0
    assert record["facts"]["rl"]["steps"] == 3


def test_a_kill_while_it_is_reinforced_ends_at_the_same_weights(models, tmp_path, monkeypatch):
    monkeypatch.setattr("flr.train.updates.decide", lambda *_: (True, "kept: a test says so", {}))
    monkeypatch.setattr("flr.train.update_rl.decide", lambda *_: (True, "kept: a test says so", {"all": {}}))
    more = [*RL, "--rl_steps", "4", "--save_steps", "2", "--card", "false"]

    def attempt(name, kill=0):
        def run():
            torch.set_num_threads(1)
            if kill:
                kill_at(kill, tmp_path / name)
            return updated(models, "sid", tmp_path / name, *more)[0]

        return in_child(run)

    assert attempt("quiet") == 0
    rl = tmp_path / "cut" / ".out.update" / "rl"
    seen, status = [], -9
    for kill in (330, *[110] * 6):  # the supervised steps have ended; then some way at a time
        if (status := attempt("cut", kill)) != -9:
            break
        whole = (rl / "model.safetensors").is_file()
        seen.append("ended" if whole else "begun" if any(rl.glob("checkpoint-*")) else "not begun")
    assert status == 0
    assert {"begun", "ended"} <= set(seen), seen
    assert same(weights(tmp_path / "cut" / "out"), weights(tmp_path / "quiet" / "out"))


def test_what_cannot_be_reinforced_is_refused_before_anything_is_learned(models, tmp_path, capsys):
    mixture = ["--codec", "sid", "--aggregation", "mixture", "--num_factors", "2", "--max_steps", "1"]
    where = ["--data", str(models / "old"), "--output_dir", str(tmp_path / "mixture")]
    assert main(["sft", *where, *SFT, *SMALL, *mixture]) == 0
    capsys.readouterr()
    none = "model: expected a patched model of variant flr, offsets or latentr3, got one without a reasoner"
    for model, options, expected in (
        (models / "title", RL, none),
        (models / "id", RL, none),
        (tmp_path / "mixture", RL, "aggregation: expected thought for latent GRPO, which perturbs one thought"),
        (models / "sid", ["--rl_steps", "-1"], "rl_steps: expected an integer >= 0, got -1"),
        (models / "sid", [*RL, "--rl_group_size", "1"], "rl_group_size: expected an integer >= 2, got 1"),
        (models / "sid", [*RL, "--rl_likelihood_weight", "2"], "rl_likelihood_weight: expected a number in [0, 1]"),
        (models / "sid", [*RL, "--rl_reward", "luck"], "luck"),
        (models / "sid", ["--rl_reward", "mrr"], "rl_reward: expected rl_steps beside it"),
    ):
        assert updated(models, "sid", tmp_path, *options, model=model) == (1, {})
        assert expected in capsys.readouterr().err
        assert not (tmp_path / ".out.update").exists()
