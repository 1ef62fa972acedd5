"""What ``flr sft`` and ``flr rl`` share."""

from types import SimpleNamespace

from flr.cli.training import summarise


def test_the_summary_has_length_and_speed_where_there_was_a_training():
    args = SimpleNamespace(output_dir="runs/a")
    metrics = {"train_runtime": 5.0, "padding": 0.25, "tokens_per_second": 10.0, "train_loss": 1.0}
    outcome = SimpleNamespace(global_step=7, metrics=metrics)
    length = {"steps": 7, "seconds": 5.0, "padding": 0.25, "tokens_per_second": 10.0}
    assert summarise(args, {"a": 1}, outcome, {"b": 2}) == {"output_dir": "runs/a", "a": 1, **length, "b": 2}
    assert "padding" not in summarise(args, {}, SimpleNamespace(global_step=7, metrics={}), {})


def test_shared_options_come_after_a_command_s_own():
    from flr.cli.backbone import ModelOptions
    from flr.cli.rl import RLOptions

    assert RLOptions("runs/a").model == ModelOptions("runs/a").model == "runs/a"
