"""Processes that die while they load."""

import threading
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from flr.batch import processes
from flr.batch.plan import Shard
from flr.batch.worker import Outcome

SHARDS = [Shard(number, 0, 8 * number, 8 * number + 8) for number in range(4)]


def run(monkeypatch, deaths: int, before: bool) -> list[int]:
    """Numbers of the shards done by two workers, of which the second dies ``deaths`` times while it loads."""
    starts, working = [], threading.Event()

    def work(connection, place):
        if place == 1 and starts.count(1) <= deaths:
            before or working.wait(10)  # the other one has loaded and was given a shard
            connection.close()
            return
        connection.send(True)
        try:
            while True:
                shard = connection.recv()
                working.set()
                again.wait(10)  # there is work left until the one that dies has come to stay
                connection.send(Outcome(shard.number, 8, 0.0, None))
        except (EOFError, OSError):
            return

    again = threading.Event()

    def start(plan, place):
        mine, theirs = Pipe()
        starts.append(place)
        if starts.count(1) > deaths:
            again.set()
        threading.Thread(target=work, args=(theirs, place), daemon=True).start()
        process = SimpleNamespace(join=lambda *_: None, exitcode=-9, terminate=lambda: None, kill=lambda: None)
        return processes._Child(place, process, mine)

    monkeypatch.setattr(processes._Child, "start", staticmethod(start))
    return sorted(outcome.shard for outcome in processes.in_processes(SimpleNamespace(model="m"), SHARDS, 2))


def test_one_is_replaced_where_another_has_loaded_the_model(monkeypatch):
    assert run(monkeypatch, deaths=1, before=False) == [0, 1, 2, 3]


def test_one_that_dies_again_ends_the_run(monkeypatch):
    with pytest.raises(ValueError, match=r"worker: expected it to load m, got its death \(signal SIGKILL\)"):
        run(monkeypatch, deaths=9, before=False)


def test_one_ends_the_run_where_nobody_has_loaded(monkeypatch):
    monkeypatch.setattr(processes, "wait", lambda connections: [connections[1]])  # the first one's word comes later
    with pytest.raises(ValueError, match="worker: expected it to load m, got its death"):
        run(monkeypatch, deaths=1, before=True)
