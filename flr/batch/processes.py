"""Shards on this machine: in this process, or handed out to processes of its own.

A process that dies (killed, out of memory) takes its shard along, which another gets; a shard that took ``_TRIES``
processes along is given up. If the process that hands out dies, the others end after the shard that they are at.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from .plan import Plan, Shard
from .worker import Outcome, Worker

_TRIES = 2


def in_this_process(plan: Plan, shards: Sequence[Shard]) -> Iterator[Outcome]:
    """The outcome of every shard, one after the other; errors of the worker's making are raised."""
    worker = Worker(plan, plan.settings.device)
    yield from map(worker, shards)


def in_processes(plan: Plan, shards: Sequence[Shard], workers: int) -> Iterator[Outcome]:
    """The outcome of every shard, as they are done.

    A process that dies is replaced; one that dies while it loads only where another has loaded the same model.

    Raises:
        ValueError: a process could not load the model; says why.
    """
    waiting, tries, unborn = deque(shards), Counter[int](), 0
    children = [_Child.start(plan, place) for place in range(min(workers, len(shards)))]
    try:
        while waiting or any(child.shard is not None for child in children):
            for child in children:
                if waiting and child.ready and child.shard is None:
                    child.give(waiting.popleft())
            for connection in wait([child.connection for child in children]):
                child = next(child for child in children if child.connection is connection)
                try:
                    told = child.connection.recv()
                except (EOFError, ConnectionError):
                    shard, place = child.shard, children.index(child)
                    death = child.bury()
                    unborn += not child.ready
                    if not child.ready and (unborn >= _TRIES or not any(other.ready for other in children)):
                        raise ValueError(f"worker: expected it to load {plan.model}, got its death ({death})") from None
                    children[place] = _Child.start(plan, child.place)
                    if shard is None:
                        continue
                    tries[shard.number] += 1
                    if tries[shard.number] < _TRIES:
                        waiting.appendleft(shard)
                    else:
                        yield Outcome(shard.number, 0, 0.0, f"{_TRIES} processes died of it ({death})")
                    continue
                if isinstance(told, str):
                    raise ValueError(told)
                if isinstance(told, Outcome):
                    child.shard = None
                    yield told
                child.ready = True
    finally:
        for child in children:
            child.end()


@dataclass(eq=False)
class _Child:
    """A process with a worker: not ``ready`` until its model is loaded, at ``shard`` or idle."""

    place: int
    process: BaseProcess
    connection: Connection
    ready: bool = False
    shard: Shard | None = None

    @classmethod
    def start(cls, plan: Plan, place: int) -> _Child:
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        mine, theirs = context.Pipe()
        device = plan.settings.device
        if device == "cuda":
            device = f"cuda:{place % max(torch.cuda.device_count(), 1)}"
        process = context.Process(target=_work, args=(theirs, plan, device), daemon=True, name=f"flr-batch-{place}")
        process.start()
        theirs.close()  # so that the end of either process is the end of the pipe
        return cls(place, process, mine)

    def give(self, shard: Shard) -> None:
        self.shard = shard
        with contextlib.suppress(OSError):  # it is dead, which waiting for it tells
            self.connection.send(shard)

    def bury(self) -> str:
        """Of what it died."""
        self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"

    def end(self) -> None:
        """Stop it where it is; what it writes is whole or not there."""
        self.connection.close()
        self.process.terminate()
        self.process.join(10)
        if self.process.exitcode is None:
            self.process.kill()


def _work(connection: Connection, plan: Plan, device: str) -> None:
    """In the process: load, say so (or why not), then a shard in, an outcome out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the first process's to answer
    from transformers.utils import logging as said

    said.disable_progress_bar()
    torch.set_num_threads(plan.settings.threads)
    try:
        worker = Worker(plan, device)
    except Exception as error:
        connection.send(f"{error}" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}")
        return
    connection.send(True)
    try:
        while True:
            connection.send(worker(connection.recv()))
    except (EOFError, ConnectionError):
        return
