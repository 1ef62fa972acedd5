"""The harness: peak memory, races, one command that checks, measures and writes."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import harness, results

ROOT = Path(__file__).parents[2]


def test_peak_memory_is_what_was_alive_at_a_time():
    def apart():
        torch.empty(1_000_000)
        torch.empty(500_000)

    def together():
        return torch.empty(1_000_000), torch.empty(500_000)

    assert harness.peak_bytes(apart) == 4_000_000
    assert harness.peak_bytes(together) == 6_000_000
    assert harness.peak_bytes(lambda: np.empty(1_000_000), "numpy") == pytest.approx(8_000_000, rel=0.01)


def test_a_race_is_run_in_turns_and_its_ratio_is_that_of_each_round(monkeypatch):
    order = []
    durations = {"flr": iter([3, 1, 1, 2, 4]), "slow": iter([9, 10, 30, 20, 40])}  # the first of each chooses calls

    def seconds(call, calls, clock=None):
        order.append(call())
        return next(durations[order[-1]]) / 1e3

    monkeypatch.setattr(harness, "seconds", seconds)
    monkeypatch.setattr(harness, "peak_bytes", lambda call, memory: None)

    def broken():
        raise RuntimeError("out of luck\nat length")

    race = harness.Race({"flr": lambda: "flr", "slow": lambda: "slow", "broken": broken}, "quick", rounds=4)
    order.clear()
    race.run()
    assert order == ["slow", "flr"] * 4
    ours, slow, failed = race.rows({"bytes": 10**6}, FixedCeilings(), "float32", {"slow": 3.0, "broken": 2.0})
    assert ours["p50_ms"] == 1.5
    assert ours["gb_per_s"] == pytest.approx(10**6 / 1.5e-3 / 1e9)
    assert ours["of_copy"] == ours["of_ceiling"] == pytest.approx(10**6 / 1.5e-3 / 1e10)
    assert slow["ratio"]["p50"] == 10  # of 10, 30, 10, 10; the ratio of medians would be 25 / 1.5
    assert slow["target"] == 3.0
    assert failed["failed"] == "RuntimeError: out of luck"
    assert not {"p50_ms", "ratio", "peak_mb"} & failed.keys()
    assert "peak_mb" not in ours  # not measured is absent


def test_a_competitor_with_another_result_has_failed_and_is_not_timed():
    def agree(name, result):
        if result != 1:
            raise AssertionError(f"{name}: expected 1, got {result}")

    calls = {"flr": lambda: 1, "right": lambda: 1, "wrong": lambda: 2}
    race = harness.Race(calls, "quick", rounds=2, agree=agree)
    race.run()
    _, right, wrong = race.rows({}, FixedCeilings(), "float32", None)
    assert right["ratio"]["p50"] > 0
    assert wrong == {"variant": "wrong", "failed": "AssertionError: wrong: expected 1, got 2"}


def test_kernels_are_timed_by_graphs_of_whole_rounds_of_the_inputs_or_all_by_calls(monkeypatch):
    def captured(call, calls):
        if call() == "waits":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: [call() for _ in range(calls)]

    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(harness, "seconds", lambda call, calls, clock=None: 1e-3 * np.size(call()))
    monkeypatch.setattr(harness, "peak_bytes", lambda call, memory: None)
    ours = harness.rotating(lambda x: x, [("a",), ("b",), ("c",)])

    def rows(others):
        race = harness.Race({"flr": ours, **others}, "quick", rounds=2, clock="graph")
        race.run()
        return race.rows({}, FixedCeilings(), "float32", None)

    assert rows({})[0]["p50_ms"] == 1  # of one call, not of the nine in the graph
    assert rows({})[0]["calls"] % 9 == 0
    assert {row["clock"] for row in rows({"plain": lambda: "plain"})} == {"graph"}
    found = rows({"waits": lambda: "waits"})
    assert {row["clock"] for row in found} == {"events"}  # a graph is not raced against calls
    assert "capturing" in found[1]["uncaptured"]


class FixedCeilings:
    copy = 1e10

    def matmul(self, dtype):
        return 1e12


def test_what_ours_raises_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        harness.Race({"flr": lambda: 1 / 0, "other": lambda: 1}, "quick")


def test_one_command_checks_measures_and_writes(tmp_path):
    (tmp_path / "conftest.py").write_text("from bench.conftest import *\n")
    (tmp_path / "test_two.py").write_text(
        "import pytest, torch\n"
        "from bench.harness import label\n"
        "def wrong():\n    raise AssertionError('ours is wrong')\n"
        "@pytest.mark.cases(quick=[{'B': 8}], default=[{'B': 16}, {'B': 32}])\n"
        "@pytest.mark.parametrize('check', [None, wrong])\n"
        "def test_two(shape, check, race):\n"
        "    x = torch.ones(shape['B'], 1000)\n"
        "    p50 = race(label(shape), {'flr': x.sum, 'twice': lambda: (x.sum(), x.sum())}, suite='two', shape=shape,\n"
        "               check=check, bytes_moved=x.nbytes)\n"
        "    assert 0 < p50['flr'] < p50['twice']\n"
    )
    words = ["-m", "pytest", "-q", "--quick", "--benchmark-only", "--results", str(tmp_path / "out"), str(tmp_path)]
    # pytest-benchmark disables itself where pytest-xdist's variables are set, as they are under `pytest -n`
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout  # the wrong one was not timed
    (path,) = (tmp_path / "out").glob("*/*.json")
    document = results.load(path)
    (run,) = document["runs"]
    assert run["commit"] == document["commit"] == path.stem.removesuffix("-dirty")
    assert run["versions"]["torch"] == version("torch")
    assert run["ceilings"]["copy_gb_per_s"] > 0
    ours, twice = run["rows"]
    assert ours["shape"] == {"B": 8}
    assert ours["check"] == "none given"
    assert ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"]
    assert ours["bytes"] == 8 * 1000 * 4
    assert 1 < twice["ratio"]["p50"] < 4
