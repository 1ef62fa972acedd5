"""How a number is made: ceilings, timing, peak memory, rows.

A *race* times ours and its competitors in turn, once each a round, so that a disturbance of the machine hits all alike.
A ratio is the median over rounds of competitor / ours; p20 and p80 go with it. Nothing that could not be measured is
reported: the key is absent.
"""

from __future__ import annotations

import ctypes
import gc
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, cycle
from typing import Any

import numpy as np
import torch

from flr.decode.capture import capturing, cause

from .machine import DEVICE, ON_GPU

TIERS = ("quick", "default", "full")
#: Most rounds of a race, fewest, and the seconds after which the fewest do.
ROUNDS = {"quick": (15, 3, 2.0), "default": (31, 3, 15.0), "full": (51, 5, 60.0)}
#: A round calls a variant until this much time has passed: launches and the final wait do not count.
ROUND_SECONDS = {"quick": 2e-3, "default": 5e-3, "full": 2e-2}
MAX_CALLS = 50
#: Fewest calls in a CUDA graph that is timed.
GRAPH_CALLS = 8
#: Seconds for a program to start, such as a server on a busy machine.
START_SECONDS = 300


def keep_memory() -> None:
    """Make glibc reuse freed memory of every size, whatever was allocated before.

    By default buffers over a threshold, which moves with what was freed so far (128 KB to 32 MB), are unmapped when
    freed, and each call
    faults their pages in again: a race of calls of a millisecond then depends on the tests before it by up to a factor
    of 3.6.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def rotation(item_bytes: int) -> int:
    """How many input sets make every read come from device memory: twice the L2 in all (one set on the CPU)."""
    if not ON_GPU:
        return 1
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, min(16, -(-2 * l2 // max(item_bytes, 1))))


def rotating(call: Callable, input_sets: Sequence[tuple]) -> Callable[[], Any]:
    """``call`` without arguments, taking the next input set each time; its ``sets`` says how many there are."""
    inputs = cycle(input_sets)

    def run() -> Any:
        return call(*next(inputs))

    run.sets = len(input_sets)  # type: ignore[attr-defined]
    return run


def label(shape: dict[str, Any]) -> str:
    """A shape as text, ``B4 L256 float32``: one-letter names stand before their number, words after ``=``."""
    parts = []
    for key, value in shape.items():
        value = str(value).removeprefix("torch.")
        parts.append(value if key == "dtype" else f"{key}{value}" if len(key) == 1 else f"{key}={value}")
    return " ".join(parts)


class Ceilings:
    """What this device does at best, measured once a session: bytes/s of a large copy, FLOP/s of a large matmul."""

    def __init__(self, tier: str) -> None:
        self._small = tier == "quick"
        self._copy: float | None = None
        self._matmul: dict[str, float] = {}

    @property
    def copy(self) -> float:
        """Bytes/s of a large copy, those read and those written both counted."""
        if self._copy is None:
            count = (1 << 28) if ON_GPU else (1 << (24 if self._small else 25))  # 1 GiB, 64 or 128 MiB
            source, target = torch.ones(count, device=DEVICE), torch.empty(count, device=DEVICE)
            self._copy = 8 * count / _best(lambda: target.copy_(source))
        return self._copy

    def matmul(self, dtype: str) -> float:
        """FLOP/s of a large square product of ``dtype``, a multiply and an add counted as two."""
        if dtype not in self._matmul:
            size = 8192 if ON_GPU else 1024
            a = torch.randn(size, size, device=DEVICE).to(getattr(torch, dtype))
            out = torch.empty_like(a)
            self._matmul[dtype] = 2 * size**3 / _best(lambda: torch.mm(a, a, out=out))
        return self._matmul[dtype]

    def measured(self) -> dict[str, Any]:
        found: dict[str, Any] = {"copy_gb_per_s": self.copy / 1e9}
        if self._matmul:
            found["matmul_tflop_per_s"] = {k: v / 1e12 for k, v in self._matmul.items()}
        return found


def _best(call: Callable, repeats: int = 9) -> float:
    """The lower quartile of a few timed calls, seconds: a ceiling, yet not the luckiest call."""
    times = [seconds(call, 1) for _ in range(repeats + 2)][2:]
    return float(np.percentile(times, 25))


def captured(call: Callable, calls: int) -> Callable[[], Any]:
    """A CUDA graph of ``calls`` calls; replaying it costs the device's time and not that of launching from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and allocate
        for _ in range(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for _ in range(calls):
            call()
    return graph.replay


def kernel_clock() -> str:
    """What races of kernels are timed by: replays of a CUDA graph on a GPU, since launching some of them from Python
    takes longer than they do."""
    return "graph" if ON_GPU else ""


def default_clock() -> str:
    """``events`` on a GPU. On the CPU ``process`` for one thread: time that other programs had the core is not counted,
    which on a shared machine is most of the noise; else ``wall``."""
    return "events" if ON_GPU else "process" if torch.get_num_threads() == 1 else "wall"


def seconds(call: Callable, calls: int, clock: str | None = None) -> float:
    """Seconds a call, mean of ``calls``, by CUDA events, the CPU time of this process, or the monotonic clock."""
    clock = clock or default_clock()
    if clock in ("events", "graph"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    now = {"process": time.process_time, "wall": time.perf_counter}[clock]
    begin = now()
    for _ in range(calls):
        call()
    synchronize()
    return (now() - begin) / calls


def peak_bytes(call: Callable, memory: str = "torch") -> int | None:
    """Most bytes that one call held at a time beyond those that were there before it; None where it cannot be told.

    CUDA: the caching allocator's high-water mark. CPU: the profiler's record of every allocation and release of
    PyTorch's CPU allocator, summed in order of time; compiled code and the backward count, memory that a library takes
    by itself (packing buffers of the matrix products) and NumPy's do not. ``memory="numpy"`` counts those of NumPy and
    Python objects instead, as tracemalloc sees them.
    """
    if memory == "numpy":
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    results = record.profiler.kineto_results if record.profiler else None
    if results is None:
        return None
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(accumulate((size for _, size in events), initial=0)) if events else None


@dataclass
class Variant:
    """One competitor of a race, ours included."""

    name: str
    call: Callable[[], Any]
    clock: str
    memory: str = "torch"
    calls: int = 1
    times: list[float] = field(default_factory=list)
    peak: int | None = None
    failed: str | None = None
    #: With clock "graph": calls in the graph, what is replayed, why there is none, and seconds of a call from Python.
    inside: int = 1
    replay: Callable[[], Any] | None = None
    uncaptured: str | None = None
    from_python: float | None = None

    def prepare(self, tier: str) -> None:
        """Warm up (compile), measure memory, capture, and choose how many calls make a round."""
        self.call()
        synchronize()
        self.peak = peak_bytes(self.call, self.memory)
        if self.clock == "graph":
            self.from_python = min(seconds(self.call, 10) for _ in range(3))
            self._capture()
        self.choose_calls(tier)

    def _capture(self) -> None:
        sets = getattr(self.call, "sets", 1)
        self.inside = sets * -(-GRAPH_CALLS // sets)  # each input set equally often
        try:
            self.replay = captured(self.call, self.inside)
        except RuntimeError as error:
            self.uncaptured = reason(error)
            synchronize()

    def from_now_on_by_calls(self, tier: str) -> None:
        """Go without the graph."""
        self.clock, self.replay, self.inside = "events", None, 1
        self.choose_calls(tier)

    def choose_calls(self, tier: str) -> None:
        once = self._seconds(1)
        if once < ROUND_SECONDS[tier]:  # the first is often slow
            once = min(once, *(self._seconds(1) for _ in range(4)))
        self.calls = max(1, min(MAX_CALLS, round(ROUND_SECONDS[tier] / max(once * self.inside, 1e-9))))
        self.times = [once]

    def _seconds(self, runs: int) -> float:
        return seconds(self.replay or self.call, runs, self.clock) / self.inside

    def time(self) -> None:
        if self.calls > 1:
            (self.replay or self.call)()  # untimed: caches hold what the variant before left there
        self.times.append(self._seconds(self.calls))


def rounds_for(tier: str, round_seconds: float) -> int:
    most, fewest, budget = ROUNDS[tier]
    return max(fewest, min(most, int(budget / max(round_seconds, 1e-9))))


def reason(error: BaseException) -> str:
    """One line for a table."""
    return f"{type(error).__name__}: {cause(error)}"[:300]


def guarded(variant: Variant, action: Callable[[], None]) -> None:
    """Run ``action`` of a competitor; what it raises is its result, not the suite's."""
    try:
        action()
    except Exception as error:  # any failure of a competitor is recorded with its reason
        variant.failed = reason(error)
        variant.times.clear()


class Race:
    """Ours (the first variant) and its competitors over the same work."""

    def __init__(
        self,
        variants: dict[str, Callable[[], Any]],
        tier: str,
        rounds: int | None = None,
        clock: str = "",
        memory: str = "torch",
        agree: Callable[[str, Any], None] | None = None,
    ) -> None:
        if not variants:
            raise ValueError("variants: expected at least one, got none")
        self.clock = clock or default_clock()
        self.ours, *self.others = (Variant(name, call, self.clock, memory) for name, call in variants.items())
        self.ours.prepare(tier)
        for other in self.others:
            if agree is not None:
                guarded(other, lambda other=other: agree(other.name, other.call()))
            if not other.failed:
                guarded(other, lambda other=other: other.prepare(tier))
        alive = [self.ours, *(o for o in self.others if not o.failed)]
        if any(variant.uncaptured for variant in alive):  # a graph against calls would compare different things
            self.clock = "events"
            for variant in alive:
                variant.from_now_on_by_calls(tier)
        self.rounds = rounds or rounds_for(tier, sum(v.times[0] * v.calls * v.inside for v in alive))
        for variant in alive:
            variant.times.clear()
        self._round = 0

    def others_turn(self) -> None:
        """Time every competitor once; the one before ours changes from round to round."""
        if not self._round:
            gc.collect()
        if self.others:
            shift = self._round % len(self.others)
            for other in self.others[shift:] + self.others[:shift]:
                if not other.failed:
                    guarded(other, other.time)
        self._round += 1

    def run(self, pedantic: Callable | None = None) -> None:
        """All rounds, under ``benchmark.pedantic`` where given, so that pytest-benchmark counts the test."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            if pedantic is not None:
                pedantic(self.ours.time, setup=self.others_turn, rounds=self.rounds)
            else:
                for _ in range(self.rounds):
                    self.others_turn()
                    self.ours.time()
        finally:
            if collecting:
                gc.enable()

    def rows(
        self, common: dict[str, Any], ceilings: Ceilings, dtype: str, target: dict[str, float] | None
    ) -> list[dict[str, Any]]:
        """One row a variant; ``common`` holds what they share (suite, case, shape, bytes, flops, check)."""
        found = []
        for variant in (self.ours, *self.others):
            row: dict[str, Any] = {**common, "variant": variant.name}
            if variant.failed:
                row["failed"] = variant.failed
            else:
                row |= {"clock": self.clock, "rounds": len(variant.times), "calls": variant.calls * variant.inside}
                row |= {f"{k}_ms": v * 1e3 for k, v in spread(variant.times).items()}
                row |= rates(row, ceilings, dtype)
                if variant.from_python is not None:
                    row["call_ms"] = variant.from_python * 1e3
                if variant.uncaptured:
                    row["uncaptured"] = variant.uncaptured
                if variant.peak is not None:
                    row["peak_mb"] = variant.peak / 1e6
                if variant is not self.ours:
                    row["ratio"] = spread([o / u for o, u in zip(variant.times, self.ours.times, strict=True)])
            if target and variant.name in target:
                row["target"] = target[variant.name]
            found.append(row)
        return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("p20", "p50", "p80"), (float(x) for x in np.percentile(values, (20, 50, 80))), strict=True))


def rates(row: dict[str, Any], ceilings: Ceilings, dtype: str) -> dict[str, float]:
    """GB/s, TFLOP/s and their share of the ceilings; ``of_ceiling`` is that of the tighter one (roofline)."""
    found, time_s = {}, row["p50_ms"] / 1e3
    if "bytes" in row:
        found["gb_per_s"] = row["bytes"] / time_s / 1e9
        found["of_copy"] = row["bytes"] / time_s / ceilings.copy
    if "flops" in row:
        found["tflop_per_s"] = row["flops"] / time_s / 1e12
        found["of_matmul"] = row["flops"] / time_s / ceilings.matmul(dtype)
    shares = [found[key] for key in ("of_copy", "of_matmul") if key in found]
    if shares:
        found["of_ceiling"] = max(shares)
    return found
