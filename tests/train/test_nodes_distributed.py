"""``torchrun --nnodes 2``: two launchers of a process each, as on two machines, whose processes are both the first of
their node; the weights are those of one process, and only the first of all writes and speaks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.run import main as torchrun

import flr
from flr.cli import main
from flr.serve.server import bind
from flr.train.run_folder import RUN_NAME, STATE_NAME

STEPS, ROWS = 4, 16
#: SGD, since Adam makes whole steps of gradients that are rounding.
OPTIONS = ["sft", "--planted_items", "40", "--planted_users", "60", "--use_cpu", "true", "--hidden_size", "32",
           "--intermediate_size", "32", "--anchor", "last", "--optim", "sgd", "--learning_rate", "0.3",
           "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", str(STEPS),
           "--eval_strategy", "steps", "--eval_steps", str(STEPS), "--load_best_model_at_end", "false"]  # fmt: skip


def launch(node: int, port: int, folder: str) -> None:
    """The launcher of a node. Nodes have a folder each, so that one sees what each of them writes."""
    os.environ |= {"PYTHONPATH": str(Path(flr.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    here = Path(folder, f"node-{node}")
    here.mkdir()
    os.chdir(here)
    where = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    where += ["--master_port", str(port), "--log_dir", f"{folder}/logs-{node}", "--redirects", "3"]
    rows = ["--per_device_train_batch_size", str(ROWS // 2), "--ddp_backend", "gloo", "--output_dir", "run"]
    loud = ["--verbose", "--disable_tqdm", "true"]  # transformers says its lines, too
    torchrun([*where, "-m", "flr.cli", *OPTIONS, *rows, *loud])


def said(folder: Path, node: int, stream: str) -> str:
    """By the process of a node."""
    (log,) = (folder / f"logs-{node}").rglob(f"{stream}.log")
    assert log.parent.name == "0"  # LOCAL_RANK
    return log.read_text()


def losses(run: Path) -> list[float]:
    """Of the steps, as they were logged."""
    return [line["loss"] for line in json.loads((run / STATE_NAME).read_text())["log_history"] if "loss" in line]


def test_two_nodes_train_as_one_process_and_the_first_of_all_writes_and_speaks(tmp_path):
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    # a server that has imported torch forks both launchers
    mp.get_context("forkserver").set_forkserver_preload(["tests.helpers.training"])
    mp.start_processes(launch, (port, str(tmp_path)), 2, start_method="forkserver")
    one, two = tmp_path / "one", tmp_path / "node-0" / "run"
    assert main([*OPTIONS, "--per_device_train_batch_size", str(ROWS), "--output_dir", str(one)]) == 0
    expected, found = (load_file(run / "model.safetensors") for run in (one, two))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    best = json.loads((one / RUN_NAME).read_text())["summary"]["best_valid"]
    assert best == json.loads((two / RUN_NAME).read_text())["summary"]["best_valid"] > 0
    states = {f"checkpoint-{STEPS}/rng_state_{i}.pth" for i in range(2)} | {f"checkpoint-{STEPS}/rng_state.pth"}
    here, there = ({str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} for run in (one, two))
    assert here - states == there - states
    # its own random numbers are all that the second one writes, into a checkpoint that nodes share otherwise
    other = [p.name for p in (tmp_path / "node-1").rglob("*") if p.is_file()]
    assert other == ["rng_state_1.pth"]
    assert said(tmp_path, 0, "stdout").count("Saved in") == 1
    assert said(tmp_path, 0, "stderr").count("'grad_norm'") + said(tmp_path, 0, "stdout").count("'grad_norm'") == STEPS
    assert said(tmp_path, 1, "stdout") == ""
    for word in ("grad_norm", "Data 'planted'", "NDCG", "it/s"):
        assert word not in said(tmp_path, 1, "stderr")
