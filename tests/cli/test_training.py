"""What ``flr sft`` and ``flr rl`` share."""

from types import SimpleNamespace

import pytest

from flr.cli import main
from flr.cli.backbone import ModelOptions
from flr.cli.on_ray import RayOptions
from flr.cli.options import DataOptions
from flr.cli.training import summarise
from flr.config import FLRConfig
from flr.data import planted_dataset
from flr.train import SFTTrainer


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


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_no_evaluation_means_none_at_the_end_either(tmp_path, monkeypatch, strategy):
    ranked = []
    rank = SFTTrainer._rank
    monkeypatch.setattr(SFTTrainer, "_rank", lambda self, rows: (ranked.append(len(rows)), rank(self, rows))[1])
    argv = ["sft", "--planted_items", "20", "--planted_users", "40", "--hidden_size", "16", "--intermediate_size", "16"]
    argv += ["--num_attention_heads", "2", "--use_cpu", "true", "--max_steps", "1", "--eval_strategy", strategy]
    argv += ["--load_best_model_at_end", "false", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    assert bool(ranked) == (tmp_path / "valid").exists() == (strategy != "no")


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
