"""The command line, driven as a user would: subprocesses, kill -9, resumed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flr
from flr.cli import COMMANDS, main
from flr.train import last_complete_checkpoint

SMALL = [
    "--planted_items", "60", "--planted_users", "150", "--hidden_size", "32", "--intermediate_size", "32",
    "--anchor", "last", "--per_device_train_batch_size", "64", "--learning_rate", "3e-3",
    "--use_cpu", "true", "--report_to", "none",
]  # fmt: skip


def flr_command(*words, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = "import sys; from flr.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, text=True, **kwargs)


@contextlib.contextmanager
def one_thread():
    """This process adds in the order in which ``flr_command`` does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_top_level(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == flr.__version__
    assert main(["fly"]) == 2
    assert "expected a command" in capsys.readouterr().err
    assert main(["evalute"]) == 2
    assert "got 'evalute'; did you mean evaluate?" in capsys.readouterr().err


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    config = tmp_path / "wrong.yaml"
    config.write_text("learning_rat: 1\n")
    assert main(["sft", "--config", str(config)]) == 1
    assert "expected options of flr sft, got learning_rat" in capsys.readouterr().err
    assert main(["sft", "--data", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
    assert main(["sft", "--num_factors", "99"]) == 1
    assert "num_factors: expected 1 to 16, got 99" in capsys.readouterr().err


def test_flags_override_the_config_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path / 'a'}\nnum_train_epochs: 9\nnum_factors: 2\n")
    assert main(["sft", "--config", str(config), *SMALL, "--num_train_epochs", "1"]) == 0
    state = json.loads((tmp_path / "a" / "trainer_state.json").read_text())
    assert state["epoch"] == 1
    assert flr.from_pretrained(tmp_path / "a").config.flr["num_factors"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "rl"])
def test_killed_and_resumed_reaches_the_same_weights(command, tmp_path):
    options = [*SMALL, "--num_train_epochs", "4", "--embedding_dropout", "0.2", "--dropout", "0.2",
               "--augment_drop_item", "0.3", "--teacher", "auto", "--save_total_limit", "9"]  # fmt: skip
    if command == "rl":
        start = str(tmp_path / "start")
        assert main(["sft", *SMALL, "--num_train_epochs", "1", "--output_dir", start]) == 0
        options = [*SMALL[:4], *SMALL[-8:], "--model", start, "--num_train_epochs", "6", "--save_total_limit", "9",
                   "--num_iterations", "2", "--kl_weight", "0.01", "--group_size", "4"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with one_thread():
        assert main([command, *options, "--output_dir", str(whole)]) == 0
    process = flr_command(command, *options, "--output_dir", str(killed), stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while last_complete_checkpoint(killed) is None and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
    done = last_complete_checkpoint(killed)
    assert done is not None
    assert not (killed / "model.safetensors").exists()
    # what a kill in the middle of a save leaves behind is not resumed from
    steps = int(done.rpartition("-")[2])
    torn = killed / f"checkpoint-{steps + 1}"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert last_complete_checkpoint(killed) == done
    again = flr_command(
        command, *options, "--output_dir", str(killed), "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert f"checkpoint-{steps}" in err.replace("\n", "")
    assert json.loads(out)["steps"] == json.loads((whole / "trainer_state.json").read_text())["global_step"]
    a, b = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    if command == "rl":
        before = load_file(tmp_path / "start" / "model.safetensors")
        assert {name for name in a if not torch.equal(a[name], before[name])} == {n for n in a if n.startswith("flr.")}


def test_evaluate_recommend_explain(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["sft", *SMALL, "--num_train_epochs", "1", "--output_dir", str(folder)]) == 0
    capsys.readouterr()
    data = SMALL[:4]
    assert main(["evaluate", "--model", str(folder), *data, "--output", str(tmp_path / "test"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"flr", "popularity", "item-kNN"}
    assert 0 <= report["flr"]["metrics"]["item"]["ndcg@10"] <= 1
    assert {p.name for p in (tmp_path / "test").iterdir()} == {"ranks.parquet", "metrics.json"}
    items = flr.Recommender.from_pretrained(folder).processor.catalogue.item_ids[:3]
    assert main(["recommend", "--model", str(folder), "--history", *items, "--k", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recommendations"][0]
    assert len(found) == 4
    assert all(abs(sum(r["factor_shares"]) - 1) < 1e-4 for r in found)
    page = tmp_path / "why.html"
    assert main(["explain", "--model", str(folder), "--history", *items, "--html", str(page), "--json"]) == 0
    assert page.read_text().lower().startswith("<!doctype html>")
    assert main(["recommend", "--model", str(folder), "--history", "no such item"]) == 1
    assert "no such item" in capsys.readouterr().err


def test_prepare_makes_a_folder_that_loads(tmp_path):
    log = tmp_path / "tiny.inter"
    rows = [f"u{u}\ti{(u + t) % 7}\t{100 * t + u}" for u in range(12) for t in range(6)]
    log.write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    assert main(["prepare", "recbole", "--source", str(log), "--output", str(tmp_path / "out")]) == 0
    from flr.data import load_dataset

    assert len(load_dataset(tmp_path / "out").catalogue) == 7
    assert Path(tmp_path / "out" / "meta.json").exists()


def test_compare_reuses_a_run_of_the_same_settings_only(tmp_path, capsys):
    words = ["compare", *SMALL, "--modes", "none", "--seeds", "1", "--output_dir", str(tmp_path), "--num_train_epochs"]
    assert main([*words, "1"]) == 0
    made = (tmp_path / "none-0" / "run.json").stat().st_mtime_ns
    assert main([*words, "1"]) == 0
    assert (tmp_path / "none-0" / "run.json").stat().st_mtime_ns == made
    capsys.readouterr()
    assert main([*words, "2"]) == 1
    error = capsys.readouterr().err
    assert "expected a folder without a run of other settings" in error
    assert 'num_train_epochs was "1.0" and is "2.0"' in error
