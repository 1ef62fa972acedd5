"""``flr sft`` in two workers of a Ray cluster: one is killed, and the run ends at the weights of a quiet one.

``flr rl`` there ends at the weights of one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flr.cli import main, on_ray
from flr.train.run_folder import RUN_NAME, checkpoints
from tests.helpers import ray_cluster  # noqa: F401  sets Ray up before it is imported, and skips where it is missing
from tests.helpers.processes import in_processes
from tests.train.test_restarts_distributed import OPTIONS as LAUNCHED

# isort: split

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.util import construct_user_exception_with_traceback

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
OPTIONS = [word for word in LAUNCHED if word not in ("--ddp_backend", "gloo")]
STEPS, EVERY = 40, 10
RUN = ["sft", *OPTIONS, "--max_steps", str(STEPS), "--save_steps", str(EVERY), "--eval_steps", str(EVERY)]
RUN += ["--save_total_limit", str(STEPS // EVERY)]


def workers() -> set[int]:
    """Processes of Ray Train's workers on this machine, whoever started them."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if "RayTrainWorker" in Path(f"/proc/{name}/cmdline").read_text():
                found.add(int(name))
    return found


def written(folder: Path) -> int:
    """When the first checkpoint was written, in nanoseconds."""
    return (folder / f"checkpoint-{EVERY}" / RUN_NAME).stat().st_mtime_ns


def kill_one(folder: Path, seen: list[set[int]], times: list[int]) -> None:
    """SIGKILL to one worker once there is a checkpoint; ``seen`` gets the workers before, and those afterwards."""
    end = time.monotonic() + 240
    while not checkpoints(folder):
        if time.monotonic() > end:
            return
        time.sleep(0.005)
    seen.append(workers())
    times.append(written(folder))
    os.kill(max(seen[0]), signal.SIGKILL)
    assert not (folder / RUN_NAME).exists(), "the run had ended before"
    while not (workers() - seen[0]) and time.monotonic() < end:
        time.sleep(0.05)
    seen.append(workers())


def quietly(rank: int, folder: str) -> torch.Tensor:
    """The same command in a process that a launcher has started."""
    with open(f"{folder}-{rank}.out", "w") as out, contextlib.redirect_stdout(out):
        return torch.tensor(main([*RUN, "--ddp_backend", "gloo", "--output_dir", folder]))


def test_a_worker_is_killed_and_the_weights_are_those_of_a_quiet_run(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a relative folder is that of the command, not of a worker
    seen: list[set[int]] = []
    times: list[int] = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "killed", seen, times), daemon=True)
    killer.start()
    flags = ["--ray", cluster.address, "--workers", "2", "--max_restarts", "1", "--json"]
    assert main([*RUN, "--output_dir", "killed", *flags]) == 0
    killer.join()
    before, after = seen
    assert len(before) == 2
    assert after
    assert not after & before  # all of them were started again
    assert times == [written(tmp_path / "killed")]  # and went on from there
    assert json.loads(capsys.readouterr().out)["steps"] == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed"]  # Ray's own notes are gone
    stores = tmp_path / "stores"
    stores.mkdir()
    assert [int(x) for x in in_processes(quietly, 2, stores, str(tmp_path / "quiet"))] == [0, 0]
    killed, quiet = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "quiet"))
    assert quiet.keys() == killed.keys()
    assert all(torch.equal(quiet[name], killed[name]) for name in quiet)


def test_reinforcement_by_two_workers_is_that_of_one_process(cluster, tmp_path):
    given, users = tmp_path / "sft", 8
    plain = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    data = OPTIONS[: OPTIONS.index("--hidden_size")]
    assert main(["sft", *OPTIONS, *plain, "--max_steps", "2", "--output_dir", str(given)]) == 0
    # Adam turns noise into steps
    steps = ["--max_steps", "3", "--group_size", "4", "--optim", "sgd", "--learning_rate", "0.3"]
    run = ["rl", *data, *plain, *steps, "--model", str(given)]
    flags = ["--ray", cluster.address, "--workers", "2", "--max_restarts", "0"]
    for name, rows, more in (("one", users, []), ("two", users // 2, flags)):
        output = ["--per_device_train_batch_size", str(rows), "--output_dir", str(tmp_path / name)]
        assert main([*run, *output, *more]) == 0
    before, one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("sft", "one", "two"))
    assert before.keys() == one.keys() == two.keys()
    assert max(float((one[name] - before[name]).abs().max()) for name in one) > 1e-2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_more_workers_than_the_cluster_has_processors_are_refused_at_once(cluster, tmp_path, capsys):
    """Ray would wait for another machine, and try again without end."""
    assert main([*RUN, "--ray", cluster.address, "--workers", "3", "--output_dir", str(tmp_path / "run")]) == 1
    assert "workers: expected at most 2, the CPUs there, got 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_worker_refuses_is_said(cluster, tmp_path, capsys, monkeypatch):
    """The worker is this process; what it raises comes out of Ray as a worker's error does."""

    def fit(self):
        given = self.train_loop_config
        assert given["argv"][-2:] == ["--ddp_backend", "gloo"]  # of the group of processes, which there is not here
        try:
            self.train_loop_per_worker({**given, "argv": given["argv"][:-2]})
        except ValueError as error:
            status = WorkerStatus(running=False, error=construct_user_exception_with_traceback(error))
            raise WorkerGroupPollStatus({0: status}).get_worker_group_error() from None

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    monkeypatch.setattr(on_ray, "_INSIDE", False)  # put back afterwards
    monkeypatch.chdir(tmp_path)
    flags = ["--ray", cluster.address, "--workers", "1", "--output_dir", "run", "--resume_from_checkpoint", "true"]
    assert main([*RUN, *flags]) == 1
    said = capsys.readouterr().err
    assert "ray: expected workers that end their run, got worker 0: resume_from_checkpoint: expected a whole" in said
