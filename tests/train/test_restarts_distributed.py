"""One of two processes is killed in a step; both are started again, and end at the weights of a quiet run.

As ``torchrun --max_restarts`` does it, whose command is in docs/training.md; here they are launched twice, which spares
the imports.
"""

import contextlib
import os
import signal

import pytest
import torch
import torch.multiprocessing as mp
from packaging.version import Version
from safetensors.torch import load_file

from flr.cli import main
from flr.train import SFTTrainer
from flr.train.run_folder import checkpoints
from tests.helpers.processes import in_processes

STEPS, KILLED = 6, 4
OPTIONS = ["--planted_items", "40", "--planted_users", "60", "--use_cpu", "true", "--ddp_backend", "gloo",
           "--disable_tqdm", "true", "--hidden_size", "32", "--intermediate_size", "32", "--anchor", "last",
           "--dropout", "0.2", "--embedding_dropout", "0.2", "--augment_drop_item", "0.3",
           "--per_device_train_batch_size", "16", "--learning_rate", "3e-3", "--max_steps", str(STEPS),
           "--save_strategy", "steps", "--eval_strategy", "steps",
           "--save_steps", "2", "--eval_steps", "2"]  # fmt: skip


def trains(rank: int, folder: str, killed: bool) -> torch.Tensor:
    """``flr sft`` in one of two processes, the second of which may die in a step; the step where it began."""
    step = SFTTrainer.training_step
    began: list[int] = []

    def dies(self, *args, **kwargs):
        began.append(self.state.global_step)
        if killed and rank == 1 and began[-1] == KILLED - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    SFTTrainer.training_step = dies
    # a server that was started by an earlier test has that test's standard output
    with open(f"{folder}-{rank}.out", "a") as out, contextlib.redirect_stdout(out):
        assert main(["sft", *OPTIONS, "--output_dir", folder]) == 0
    return torch.tensor(began[0])


@pytest.mark.timeout(300)
@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.11 loads nothing to cpu:0")
def test_a_killed_process_changes_nothing_about_the_weights(tmp_path):
    def launch(number: int, name: str, killed: bool = False) -> list[int]:
        stores = tmp_path / f"launch-{number}"
        stores.mkdir()
        return [int(x) for x in in_processes(trains, 2, stores, str(tmp_path / name), killed)]

    assert launch(1, "quiet") == [0, 0]
    said = [(tmp_path / f"quiet-{rank}.out").read_text().count("Saved in") for rank in range(2)]
    assert said == [1, 0]  # the first process speaks for both
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        launch(2, "killed", killed=True)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert launch(3, "killed") == [2, 2]  # from the checkpoint of step 2
    quiet, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("quiet", "killed"))
    assert quiet.keys() == killed.keys()
    assert all(torch.equal(quiet[name], killed[name]) for name in quiet)
    assert checkpoints(tmp_path / "killed")[0].name == f"checkpoint-{STEPS}"
