"""``flr sft`` and ``flr rl`` on a Ray cluster: Ray Train's workers run the command, and start again where one is lost.

A worker is a process of the command as a launcher would start it. When one dies Ray ends the others and starts all of
them anew, on nodes that are left, and the command goes on from the newest whole checkpoint in its ``output_dir``, to
the weights of a run that nothing happened to. So nothing of a checkpoint passes through Ray, and ``output_dir``, data
and model must be reachable under the same name from every node.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flr.config import option

if TYPE_CHECKING:
    from transformers import TrainingArguments

_INSIDE = False  # whether this process is such a worker


@dataclass(kw_only=True)
class RayOptions:
    """Whether the command trains here or on a cluster."""

    ray: str | None = option(
        None, "Address of a Ray cluster (auto, local, HOST:PORT, ray://HOST:PORT) whose workers train. Default: none."
    )
    workers: int | None = option(None, "Ray: how many processes train together; part of a run. A GPU each, or a CPU.")
    max_restarts: int = option(3, "Ray: how often the workers are started again when one is lost.")

    def __post_init__(self) -> None:
        if self.workers is not None and self.ray is None:
            raise ValueError(f"workers: expected the address of a cluster beside it (--ray), got {self.workers} alone")
        if self.ray is not None and (self.workers is None or self.workers < 1):
            raise ValueError(f"workers: expected at least 1 with --ray, got {self.workers}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts: expected at least 0, got {self.max_restarts}")

    def elsewhere(self) -> bool:
        """Whether the command is to hand its work over."""
        return self.ray is not None and not _INSIDE


def train_on_ray(command: str, argv: list[str], options: RayOptions, args: TrainingArguments) -> dict[str, Any]:
    """Run ``flr command argv`` in workers of the cluster; the summary of the run.

    Args:
        command: sft or rl.
        argv: its flags, those about the cluster among them.
        options, args: parsed from them.

    Raises:
        ModuleNotFoundError: Ray Train is not installed: ``pip install 'flr[ray]'``.
        ConnectionError: no cluster at that address.
        ValueError: more workers than the cluster has GPUs, or CPUs where it has none or ``use_cpu`` is set.
        RuntimeError: the workers failed more often than ``max_restarts``; gives what the last of them said.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from flr.files import read_json
    from flr.train.run_folder import RUN_NAME

    output = Path(str(args.output_dir)).absolute()
    notes = output.with_name(f".{output.name}.ray")  # Ray's own, where every node sees it
    started = not ray.is_initialized()
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as ends:  # Ray writes what workers say
        if started:
            ray.init(address=options.ray, logging_level="ERROR")
            ends.callback(ray.shutdown)
        ends.callback(shutil.rmtree, notes, ignore_errors=True)
        has = ray.cluster_resources()
        gpu = not args.use_cpu and has.get("GPU", 0) > 0
        workers, most = options.workers or 1, int(has.get("GPU" if gpu else "CPU", 0))
        if workers > most:  # Ray would wait for machines, and try again without end
            raise ValueError(f"workers: expected at most {most}, the {'GPUs' if gpu else 'CPUs'} there, got {workers}")
        flags = [word for word in argv if word != "--json"]  # the result is printed here
        if not gpu:
            flags += ["--ddp_backend", "gloo"]
        restarts = FailureConfig(max_failures=options.max_restarts)
        trainer = TorchTrainer(
            _work,
            train_loop_config={"command": command, "argv": flags, "folder": os.getcwd()},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            run_config=RunConfig(name="flr", storage_path=str(notes), failure_config=restarts),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise RuntimeError(_said(error)) from error
    return read_json(output / RUN_NAME)["summary"]


def _work(config: dict[str, Any]) -> None:
    """A worker: the command, in the folder that it was given in."""
    global _INSIDE
    from . import voice

    _INSIDE = True
    os.chdir(config["folder"])
    with voice.speaking():
        importlib.import_module(f"flr.cli.{config['command']}").main(config["argv"])


def _said(error: Exception) -> str:
    """What the first worker of a run that failed said."""
    failures = getattr(error, "worker_failures", None) or {}
    told = [f"worker {rank}: {failure}" for rank, failure in sorted(failures.items())] or [str(error)]
    lines = [line.strip() for line in told[0].splitlines() if line.strip()]
    return f"ray: expected workers that end their run, got {lines[-1] if lines else type(error).__name__:.500}"
