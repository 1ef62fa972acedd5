"""What the benchmarks share: device, copy bandwidth measured in the same run, timing that rotates inputs, a table.

Where there is no GPU the CPU backends run at small sizes; the table's first line says which device it was.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
#: Calls of a round, so that the launch of a GPU kernel and the wait at the end of a round do not count.
CALLS, ROUNDS, WARMUP = (20, 15, 3) if ON_GPU else (1, 7, 2)
_ROWS: list[dict] = []
_FACTS: dict = {}


def pytest_addoption(parser) -> None:
    parser.addoption("--results", type=Path, help="write the table and the facts of the run to this JSON file")


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def rotation(item_bytes: int) -> int:
    """How many input sets make every read come from device memory: twice the L2 in all (one set on the CPU)."""
    if not ON_GPU:
        return 1
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, min(16, -(-2 * l2 // item_bytes)))


@dataclass
class Machine:
    """Facts that go into every result."""

    name: str
    copy_bandwidth: float  # bytes/s, read and written

    def facts(self) -> dict:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
        facts = {
            "device": self.name,
            "copy_gb_per_s": self.copy_bandwidth / 1e9,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "commit": commit,
        }
        try:
            import triton

            facts["triton"] = triton.__version__
        except ImportError:
            pass
        return facts


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The device, and the bandwidth of a large copy on it, counting bytes read and bytes written."""
    count = (1 << 28) if ON_GPU else (1 << 25)  # 1 GiB, 128 MiB
    source, target = torch.randn(count, device=DEVICE), torch.empty(count, device=DEVICE)
    times = []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        times.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name(DEVICE) if ON_GPU else "CPU"
    return Machine(name, 2 * 4 * count / sorted(times)[len(times) // 2])


@pytest.fixture
def measure(benchmark, machine) -> Callable:
    """``measure(call, input_sets, bytes_moved, **labels)``: time ``call(*inputs)`` and report it.

    ``bytes_moved`` are those that the algorithm must move: every input read once, every result written once. The
    competitors are held to the same number, so the GB/s column compares times.
    """

    def run(call: Callable, input_sets: Sequence[tuple], bytes_moved: int, **labels) -> float:
        inputs = cycle(input_sets)

        def round_of_calls() -> None:
            for _ in range(CALLS):
                call(*next(inputs))
            synchronize()

        if ON_GPU:
            round_of_calls()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        benchmark.pedantic(round_of_calls, rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)
        times = sorted(t / CALLS for t in benchmark.stats.stats.data)
        p20, p50, p80 = (times[int(q * (len(times) - 1) + 0.5)] for q in (0.2, 0.5, 0.8))
        row = {
            **labels,
            "p20_ms": p20 * 1e3,
            "p50_ms": p50 * 1e3,
            "p80_ms": p80 * 1e3,
            "bytes": bytes_moved,
            "gb_per_s": bytes_moved / p50 / 1e9,
            "of_copy": bytes_moved / p50 / machine.copy_bandwidth,
        }
        if ON_GPU:
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        _FACTS.update(_FACTS or machine.facts())
        benchmark.extra_info.update(row, **_FACTS)
        _ROWS.append(row)
        return p50

    return run


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not _ROWS:
        return
    write = terminalreporter.write_line
    note = "" if ON_GPU else ", small sizes: there is no GPU here"
    copy = _FACTS["copy_gb_per_s"]
    write("")
    write(f"{_FACTS['device']}{note}; copy {copy:.1f} GB/s read and written; GB/s of the bytes that must move")
    write(
        f"{'case':46} {'variant':10} {'p50 ms':>9} {'MB':>8} {'GB/s':>7} {'of copy':>8} {'peak MB':>8} {'ours is':>8}"
    )
    ours = {row["case"]: row["p50_ms"] for row in _ROWS if row["variant"] == "flr"}
    for row in _ROWS:
        ratio = row["p50_ms"] / ours[row["case"]] if row["case"] in ours else None
        peak = f"{row['peak_mb']:8.0f}" if "peak_mb" in row else f"{'':8}"
        write(
            f"{row['case']:46} {row['variant']:10} {row['p50_ms']:9.3f} {row['bytes'] / 1e6:8.1f} "
            f"{row['gb_per_s']:7.1f} {row['of_copy']:8.1%} {peak} {f'{ratio:7.1f}x' if ratio else '':>8}"
        )
    if path := config.getoption("--results"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**_FACTS, "rows": _ROWS}, indent=1) + "\n")
