"""Processes that share a device and do the jobs of a plan until they are done or the time is up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from .job import Shared, work
from .queue import Plan

_POLL = 0.2  # seconds between two looks at what is new
_LOST = 3  # failures without a success after which a study gives up


class _Process:
    """A process and the job that it does, if any."""

    def __init__(self, context: Any, shared: Shared, folder: Path, log: Path, device: str) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, shared, folder, log, device), daemon=True)
        self.process.start()
        theirs.close()
        self.job: dict[str, Any] | None = None
        self.ready = self.leaves = False
        self.began = 0.0


class Pool:
    """``processes`` processes and their work.

    Args:
        plan: says what is next, and is told what has ended.
        shared: what forked processes find; a spawned one, where they cannot have the device, gets a copy.
        work: folder for what is deleted at the end. output: of logs.
        started: ``time.monotonic()`` of the beginning.
        device: "cuda" or "cpu".
    """

    def __init__(
        self, plan: Plan, shared: Shared, work: Path, output: Path, processes: int, started: float, device: str
    ) -> None:
        self.plan, self.shared, self.work, self.log = plan, shared, work, output / "log.txt"
        self.count, self.started, self.device = processes, started, device
        self.context: Any = multiprocessing.get_context("fork")
        self.processes: list[_Process] = []
        self.made = self.failures = 0

    def run(self) -> None:
        """Until nothing is left, or the deadline."""
        try:
            while self._elapsed() < self.plan.seconds and self._begin():
                if self.failures >= _LOST * self.count and not self.plan.results.done:
                    raise RuntimeError(f"study: expected jobs that end, got {self.failures} failures; see {self.log}")
                self._listen()
        finally:
            for one in self.processes:
                one.process.kill()
                one.process.join()

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _begin(self) -> bool:
        """Give jobs to idle processes, and make processes where some are missing; whether anything is to be done."""
        wanted = min(self.count, len(self.plan.waiting) + len(self.plan.running))
        while len(self.processes) < wanted:
            self.made += 1
            folder = self.work / f"run-{self.made}"
            self.processes.append(_Process(self.context, self.shared, folder, self.log, self.device))
        for one in self.processes:
            if (
                one.ready
                and not one.leaves
                and one.job is None
                and (job := self.plan.next(self._elapsed())) is not None
            ):
                one.job, one.began = job, time.monotonic()
                one.pipe.send(job)
        return bool(self.plan.running) or (bool(self.plan.waiting) and not self._stuck())

    def _stuck(self) -> bool:
        """Whether every process is idle and none of the waiting jobs fits into the time left."""
        return bool(self.processes) and all(one.ready and not one.leaves and one.job is None for one in self.processes)

    def _listen(self) -> None:
        """Take results, and see who died."""
        by_pipe = {one.pipe: one for one in self.processes}
        for pipe in wait(list(by_pipe), timeout=_POLL):
            one = by_pipe[pipe]
            try:
                message = one.pipe.recv()
            except (EOFError, OSError):
                self._lost(one)
                continue
            if message == "ready":
                one.ready = True
            else:
                self._ended(one, *message)

    def _lost(self, one: _Process) -> None:
        one.process.join()
        self.processes.remove(one)
        self.failures += not one.leaves
        if not one.ready and not self.plan.results.done and self.context.get_start_method() == "fork":
            print(f"{self._elapsed():.1f} s: forked processes find no device; new ones begin anew", flush=True)
            self.context = multiprocessing.get_context("spawn")
        if one.job is not None:
            self.failures -= 1
            self._ended(one, {"error": f"the process died with exit code {one.process.exitcode}"}, {})

    def _ended(self, one: _Process, result: dict[str, Any], ranks: Any) -> None:
        job, one.job = one.job, None
        assert job is not None
        seconds = time.monotonic() - one.began
        self.plan.ended(job, result, ranks, seconds)
        if "error" in result:
            said = result["error"].strip().splitlines()[-1][:200]
            one.leaves = True
            self.failures += 1
        else:
            values = [f"{name} {result['metrics'][name]['ndcg@10']:.4f}" for name in result["metrics"]]
            said = f"NDCG@10 {', '.join(values)}"
        print(f"{self._elapsed():.1f} s: {job['name']} in {seconds:.1f} s: {said}", flush=True)


@contextlib.contextmanager
def service(wanted: bool, work: Path, device: str) -> Iterator[str]:
    """NVIDIA's multi-process service for processes that are begun in the block, where it is wanted and works.

    Yields a note that says which it is. Nothing of the card's settings is changed.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if not wanted or device != "cuda" or control is None:
        reason = "not asked for" if not wanted else "not there"
        yield f"multi-process service {reason}" if device == "cuda" else "on the CPU"
        return
    folders = {f"CUDA_MPS_{name}_DIRECTORY": str(work / name.lower()) for name in ("PIPE", "LOG")}
    for folder in folders.values():
        Path(folder).mkdir()
    os.environ |= folders
    begun = _quiet([control, "-d"], 10)
    try:
        if begun and _quiet([sys.executable, "-c", _PROBE], 20):
            yield "with the multi-process service"
        else:
            _quiet([control], 10, "quit\n")
            begun = False
            for name in folders:
                del os.environ[name]
            yield "multi-process service does not work here"
    finally:
        if begun:
            _quiet([control], 10, "quit\n")
            for name in folders:
                os.environ.pop(name, None)


_PROBE = "import ctypes; c = ctypes.CDLL('libcuda.so.1'); p = ctypes.c_void_p(); d = ctypes.c_int(); " \
    "assert c.cuInit(0) == 0 and c.cuDeviceGet(ctypes.byref(d), 0) == 0; " \
    "assert c.cuDevicePrimaryCtxRetain(ctypes.byref(p), d) == 0"  # fmt: skip


def _quiet(command: list[str], seconds: float, text: str = "") -> bool:
    """Whether a command ends well in time."""
    try:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # a daemon would keep a pipe open
        return subprocess.run(command, input=text.encode(), timeout=seconds, **silent).returncode == 0  # type: ignore
    except (OSError, subprocess.TimeoutExpired):
        return False
