"""The reinforcement of an update: behind the supervised steps, kept if nothing is worse."""

import shutil

import pytest
import torch

from flr.cli import main
from flr.data import Interactions
from flr.train import LatentGRPOTrainer, UpdateConfig
from flr.train.update_rl import newest, reinforcement
from tests.helpers.kills import in_child, kill_at
from tests.helpers.updates import SFT, SMALL, answering, same, split, updated, weights

RL = ["--rl_steps", "3", "--rl_group_size", "4", "--rl_learning_rate", "1e-2"]


def test_reinforcement_has_the_options_of_its_update(tmp_path):
    shared = {"seed": 11, "data_seed": 12, "max_grad_norm": 0.7, "per_device_train_batch_size": 4, "adam_beta2": 0.9,
              "gradient_accumulation_steps": 3, "per_device_eval_batch_size": 5, "save_total_limit": 2}  # fmt: skip
    own = {"rl_learning_rate": 3e-3, "rl_group_size": 5, "rl_likelihood_weight": 0.3}
    given = {"use_cpu": True, "rl_steps": 20, "learning_rate": 1.0, "eval_num_beams": 9, **shared, **own}
    found = reinforcement(UpdateConfig(**given), tmp_path, 12)
    assert {name: getattr(found, name) for name in shared} == shared
    assert {f"rl_{name}": getattr(found, name) for name in ("learning_rate", "group_size", "likelihood_weight")} == own
    assert (found.max_steps, found.save_steps, found.output_dir) == (20, 5, str(tmp_path))
    assert (found.likelihood_adaptive, found.kl_weight, found.kl_target, found.noise_target) == (True, 0.01, 0.5, 0.5)
    assert (found.reward, found.reward_beams, found.dataloader_drop_last) == ("ndcg@10", 9, True)
    few = reinforcement(UpdateConfig(**given | {"save_steps": 7, "rl_reward": "log_likelihood"}), tmp_path, 11)
    assert (few.save_steps, few.noise_target, few.dataloader_drop_last) == (
        7,
        None,
        False,
    )  # fewer rows than a step has


def test_the_newest_rows_stand_as_they_stood():
    rows = Interactions(["u"] * 4, [[0]] * 4, [0, 1, 2, 3], [5, 9, 7, 8])
    assert newest(rows, 3).targets.tolist() == [1, 2, 3]
    assert newest(rows, 2).targets.tolist() == [1, 3]
    assert newest(rows, 9).targets.tolist() == [0, 1, 2, 3]
    assert newest(Interactions(rows.users, rows.histories, rows.targets), 2).targets.tolist() == [2, 3]


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
