"""One of two processes is killed in a step; the launcher starts both again, and they end where they would have."""

import os
import signal

import pytest
import torch
import torch.multiprocessing as mp
from packaging.version import Version
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from flr.train.run_folder import checkpoints

STEPS, KILLED = 6, 4
OPTIONS = ["--planted_items", "40", "--planted_users", "60", "--use_cpu", "true", "--ddp_backend", "gloo",
           "--disable_tqdm", "true", "--hidden_size", "32", "--intermediate_size", "32", "--anchor", "last",
           "--dropout", "0.2", "--embedding_dropout", "0.2", "--augment_drop_item", "0.3",
           "--per_device_train_batch_size", "16", "--learning_rate", "3e-3", "--max_steps", str(STEPS),
           "--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", "2", "--eval_steps", "2"]  # fmt: skip


def trains(folder: str, killed: bool) -> list[int]:
    """``flr sft`` in one of two processes, the second of which dies in step ``KILLED`` the first time."""
    from flr.cli import main
    from flr.train import SFTTrainer

    torch.set_num_threads(1)
    attempt, step = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), SFTTrainer.training_step
    began: list[int] = []

    def dies(self, *args, **kwargs):
        began.append(self.state.global_step)
        if killed and attempt == 0 and os.environ["RANK"] == "1" and began[-1] == KILLED - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    SFTTrainer.training_step = dies
    assert main(["sft", *OPTIONS, "--output_dir", folder]) == 0
    return [attempt, began[0], os.getpid()]


def launch(folder, restarts: int) -> list[list[int]]:
    """As ``torchrun --nproc_per_node 2 --max_restarts …`` does it, with processes that have imported everything."""
    mp.get_context("forkserver").set_forkserver_preload(["tests.helpers.training"])
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
                          monitor_interval=0.1, start_method="forkserver")  # fmt: skip
    found = elastic_launch(config, trains)(str(folder), restarts > 0)
    return [found[rank][:2] for rank in (0, 1)]


@pytest.mark.timeout(300)
@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.11 loads nothing to cpu:0")
def test_a_killed_process_changes_nothing_about_the_weights(tmp_path):
    assert launch(tmp_path / "quiet", 0) == [[0, 0], [0, 0]]
    assert launch(tmp_path / "killed", 1) == [[1, 2], [1, 2]]  # from the checkpoint of step 2
    quiet, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("quiet", "killed"))
    assert quiet.keys() == killed.keys()
    assert all(torch.equal(quiet[name], killed[name]) for name in quiet)
    assert checkpoints(tmp_path / "killed")[0].name == f"checkpoint-{STEPS}"
