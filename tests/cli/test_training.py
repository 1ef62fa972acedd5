"""What ``flr sft`` and ``flr rl`` share."""

from types import SimpleNamespace

import pytest

from flr.cli import main
from flr.cli.backbone import ModelOptions
from flr.cli.on_ray import RayOptions
from flr.cli.options import DataOptions
from flr.cli.training import summarise
from flr.config import FLRConfig
from flr.data import RecDataset, planted_dataset
from flr.train import LatentGRPOTrainer, SFTTrainer
from flr.train.base import RecTrainer


def test_the_summary_has_length_and_speed_where_there_was_a_training():
    args = SimpleNamespace(output_dir="runs/a")
    metrics = {"train_runtime": 5.0, "padding": 0.25, "tokens_per_second": 10.0, "train_loss": 1.0}
    outcome = SimpleNamespace(global_step=7, metrics=metrics)
    length = {"steps": 7, "seconds": 5.0, "padding": 0.25, "tokens_per_second": 10.0}
    assert summarise(args, {"a": 1}, outcome, {"b": 2}) == {"output_dir": "runs/a", "a": 1, **length, "b": 2}
    assert "padding" not in summarise(args, {}, SimpleNamespace(global_step=7, metrics={}), {})


def test_shared_options_come_after_a_command_s_own():
    from flr.cli.rl import RLOptions

    assert RLOptions("runs/a").model == ModelOptions("runs/a").model == "runs/a"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"workers": 2}, r"workers: expected the address of a cluster beside it \(--ray\), got 2 alone"),
        ({"ray": "auto"}, "workers: expected at least 1 with --ray, got None"),
        ({"ray": "auto", "workers": 0}, "workers: expected at least 1 with --ray, got 0"),
        ({"ray": "auto", "workers": 2, "max_restarts": -1}, "max_restarts: expected at least 0, got -1"),
    ],
)
def test_workers_on_a_cluster_are_a_number_beside_its_address(given, told):
    with pytest.raises(ValueError, match=told):
        RayOptions(**given)
    assert RayOptions(ray="auto", workers=2).elsewhere()
    assert not RayOptions().elsewhere()


SCRATCH = ["--hidden_size", "16", "--intermediate_size", "16", "--num_attention_heads", "2"]
SHORT = ["--use_cpu", "true", "--max_steps", "1", "--load_best_model_at_end", "false", "--save_strategy", "no"]


@pytest.mark.parametrize("strategy", ["no", "epoch"])
@pytest.mark.parametrize("command", ["sft", "rl"])
def test_no_evaluation_means_none_before_or_after_either(tmp_path, monkeypatch, capsys, command, strategy):
    data = ["--planted_items", "20", "--planted_users", "40"]
    argv = [command, *data, *SHORT, "--eval_strategy", strategy, "--output_dir", str(tmp_path / "run")]
    if command == "rl":
        assert main(["sft", *data, *SCRATCH, *SHORT, "--eval_strategy", "no", "--output_dir", str(tmp_path / "m")]) == 0
        argv += ["--model", str(tmp_path / "m"), "--group_size", "2", "--metric_for_best_model", "eval_mrr"]
    ranked = []
    rank = RecTrainer._rank
    monkeypatch.setattr(RecTrainer, "_rank", lambda self, rows: (ranked.append(len(rows)), rank(self, rows))[1])
    capsys.readouterr()
    assert main([*argv, *(SCRATCH if command == "sft" else [])]) == 0
    assert bool(ranked) == (tmp_path / "run" / "valid").exists() == (strategy != "no")
    told = capsys.readouterr().out
    assert ("Valid MRR: " in told) == ("TARGET_LOGPROB" in told) == (command == "rl" and strategy != "no")


def test_without_valid_rows_the_evaluation_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    whole = planted_dataset(num_items=20, num_users=40)
    RecDataset(whole.catalogue, whole.train, whole.valid.select([]), whole.test, "short").save(tmp_path / "data")
    data = ["--data", str(tmp_path / "data"), *SHORT]
    assert main(["sft", *data, *SCRATCH, "--eval_strategy", "no", "--output_dir", str(tmp_path / "sft")]) == 0
    rl = ["rl", *data, "--model", str(tmp_path / "sft"), "--output_dir", str(tmp_path / "rl"), "--group_size", "2"]
    assert main([*rl, "--eval_strategy", "no"]) == 0
    for trainer in (SFTTrainer, LatentGRPOTrainer):
        monkeypatch.setattr(trainer, "compute_loss", lambda *_, **__: pytest.fail("a step was made"))
    for argv in (["sft", *data, *SCRATCH, "--output_dir", str(tmp_path / "other")], [*rl, "--seed", "5"]):
        assert main([*argv, "--overwrite_output_dir", "true"]) == 1
        assert "valid: expected rows to rank (or --eval_strategy no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("users", "config", "factors", "said"),
    [
        (1500, FLRConfig(), 3, "num_factors: 3, as many as groups of items that occur together; they have 100%"),
        (1500, FLRConfig(variant="offsets"), 3, "num_factors: 3, as many"),
        (
            20,
            FLRConfig(num_factors=5),
            5,
            "num_factors: 5, as without factors_from_groups, since the items do not fall",
        ),
        (1500, FLRConfig(variant="latentr3"), 1, ""),
    ],
)
def test_as_many_factors_as_groups_of_items(users, config, factors, said, capfd):
    dataset = planted_dataset(num_items=120, num_users=users, num_interests=3)
    options = ModelOptions(hidden_size=16, intermediate_size=16, num_attention_heads=2, factors_from_groups=True)
    model, _ = options.build(DataOptions(codec="id"), config, dataset, seed=0, use_cpu=True)
    assert model.config.flr["num_factors"] == factors
    told = " ".join(capfd.readouterr().err.split())
    assert said in told
    assert bool(said) == ("num_factors" in told)
