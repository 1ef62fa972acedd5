"""Fixtures of the benchmarks: ``race``, ``tier``, ``ceilings``, and the marker ``cases``, the one way to give sizes.

    @pytest.mark.cases(quick=[{"B": 2, "L": 64}], default=[{"B": 4, "L": 256}], full=[{"B": 64, "L": 512}])
    def test_something(shape, race):
        race(label(shape), {"flr": ours, "eager": theirs}, suite="something", shape=shape, check=check)

``full`` runs its cases besides the default ones. ``gpu`` and ``gpu_full`` take the place of ``default`` and ``full`` on
a GPU; ``quick`` is for both.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import results
from .harness import START_SECONDS, TIERS, Ceilings, Race, keep_memory, label
from .machine import ON_GPU, ROOT, facts

#: Seconds of wall time for a test, far above what it takes on idle cores: other programs may have most of them. A test
#: of the server waits for two start-ups of START_SECONDS each.
TIMEOUT = {"quick": 2 * START_SECONDS + 300, "default": 2400, "full": 7200}
_ROWS = pytest.StashKey[list[dict[str, Any]]]()
_STARTED = pytest.StashKey[float]()
_CEILINGS = pytest.StashKey[Ceilings]()


def pytest_addoption(parser) -> None:
    group = parser.getgroup("flr benchmarks")
    group.addoption("--quick", action="store_true", help="smallest sizes: every suite runs, in minutes (CI)")
    group.addoption("--full", action="store_true", help="largest sizes and sweeps besides the default ones")
    group.addoption(
        "--budget", type=float, help="seconds after which no further race starts; one of each test comes first"
    )
    group.addoption(
        "--results",
        type=Path,
        help="folder for <device>/<commit>.json (default: bench/results; out/bench with --quick or uncommitted code)",
    )


def tier_of(config) -> str:
    if config.getoption("--quick") and config.getoption("--full"):
        raise pytest.UsageError("expected --quick or --full, got both")
    return "quick" if config.getoption("--quick") else "full" if config.getoption("--full") else "default"


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "cases(quick, default, full, gpu, gpu_full): shapes by tier, for `shape`")
    tier = tier_of(config)
    keep_memory()
    facts()  # of the code as it is now, whatever happens to the tree before the results are written
    config.stash[_ROWS], config.stash[_STARTED] = [], time.monotonic()
    config.stash[_CEILINGS] = Ceilings(tier)


def pytest_sessionstart(session) -> None:
    """The plugin's own table is left out: wall time, most of which other programs may have taken; ours is below."""
    if (plugin := getattr(session.config, "_benchmarksession", None)) is not None:
        plugin.quiet = True


def pytest_generate_tests(metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    given = marker.kwargs
    if odd := set(given) - {*TIERS, "gpu", "gpu_full"}:
        raise pytest.UsageError(f"cases: expected quick, default, full, gpu, gpu_full, got {', '.join(sorted(odd))}")
    tier = tier_of(metafunc.config)
    if tier == "quick":
        shapes = given.get("quick", [])
    else:
        shapes = list(given["gpu"] if ON_GPU and "gpu" in given else given.get("default", []))
        if tier == "full":
            shapes += given["gpu_full"] if ON_GPU and "gpu_full" in given else given.get("full", [])
    metafunc.parametrize("shape", [pytest.param(dict(s), id=label(s).replace(" ", "-")) for s in shapes])


def pytest_collection_modifyitems(config, items) -> None:
    here = Path(__file__).parent
    if config.getoption("--budget"):
        seen: Counter[str] = Counter()
        turn = {}
        for item in items:
            turn[item.nodeid] = seen[item.nodeid.partition("[")[0]]
            seen[item.nodeid.partition("[")[0]] += 1
        items.sort(key=lambda item: turn[item.nodeid])
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.timeout(TIMEOUT[tier_of(config)]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    budget = item.config.getoption("--budget")
    if budget and time.monotonic() - item.config.stash[_STARTED] > budget:
        pytest.skip(f"the budget of {budget:g} s is spent")


@pytest.fixture(scope="session")
def tier(request) -> str:
    """``quick``, ``default`` or ``full``."""
    return tier_of(request.config)


@pytest.fixture(scope="session")
def ceilings(request) -> Ceilings:
    return request.config.stash[_CEILINGS]


@pytest.fixture
def race(request, benchmark, tier, ceilings) -> Callable[..., dict[str, float]]:
    """Time variants of the same work in turn, and keep one row each. Returns the median seconds by variant.

    Args of the function:
        case: names the work within its suite; with the variant it identifies a row.
        variants: name to function without arguments; the first is ours. A competitor that raises is reported as failed.
        suite, shape: recorded; ``shape["dtype"]`` (default float32) chooses the matrix-product ceiling.
        check: called first; raises where ours is not equal to its reference. Nothing is timed after that.
        bytes_moved, flops: what the work must move and compute, the same for all variants.
        target: the ratio competitor / ours that is wanted; reported, not asserted.
        rounds: instead of what the tier and the time of a round give.
        clock: "wall" for work that waits (a server, a subprocess); harness.kernel_clock() for kernels; default:
            harness.default_clock. Where one variant cannot be captured in a graph, all are timed by calls.
        memory: "numpy" for work in NumPy, see harness.peak_bytes.
        agree: called with every competitor's name and the result of its first call; what it raises is reported as that
            competitor's failure.
    """
    used = False

    def run(
        case: str,
        variants: dict[str, Callable[[], Any]],
        *,
        suite: str,
        shape: dict[str, Any],
        check: Callable[[], None] | None = None,
        bytes_moved: int | None = None,
        flops: int | None = None,
        target: dict[str, float] | None = None,
        rounds: int | None = None,
        clock: str = "",
        memory: str = "torch",
        agree: Callable[[str, Any], None] | None = None,
    ) -> dict[str, float]:
        nonlocal used
        rows = request.config.stash[_ROWS]
        if any((row["suite"], row["case"]) == (suite, case) for row in rows):
            raise ValueError(f"case: expected one race for each case of suite {suite}, got a second {case!r}")
        if odd := set(target or ()) - set(variants):
            raise ValueError(f"target: expected names of variants, got {', '.join(sorted(odd))}")
        if check is not None:
            check()
        racing = Race(variants, tier, rounds, clock, memory, agree)
        racing.run(None if used or not benchmark.enabled else benchmark.pedantic)
        if not used and not benchmark.enabled:
            benchmark(lambda: None)  # --benchmark-disable: the plugin wants its fixture used
        common: dict[str, Any] = {
            "suite": suite,
            "case": case,
            "shape": {k: v if isinstance(v, (int, float)) else str(v) for k, v in shape.items()},
            "tier": tier,
            "check": "passed" if check is not None else "none given",
        }
        if bytes_moved is not None:
            common["bytes"] = int(bytes_moved)
        if flops is not None:
            common["flops"] = int(flops)
        dtype = str(shape.get("dtype", "float32")).removeprefix("torch.")
        new = racing.rows(common, ceilings, dtype, target)
        rows.extend(new)
        if not used:
            benchmark.group = suite
            benchmark.extra_info.update({row["variant"]: row for row in new})
        used = True
        return {row["variant"]: row["p50_ms"] / 1e3 for row in new if "p50_ms" in row}

    return run


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    tier, found = tier_of(config), {**facts(), "ceilings": config.stash[_CEILINGS].measured()}
    write = terminalreporter.write_line
    write("")
    write(
        f"{found['device']}, {found['threads']} thread(s), {tier} sizes" + ("" if ON_GPU else ": there is no GPU here")
    )
    for line in table(rows):
        write(line)
    write(f"ceilings: {found['ceilings']}")
    scratch = tier == "quick" or found["dirty"]
    folder = config.getoption("--results") or (ROOT / "out/bench" if scratch else results.RESULTS)
    write(f"written to {results.append({**found, 'tier': tier}, rows, folder)}")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as text; a column is blank where nothing was measured."""
    width = max(len(f"{row['suite']} {row['case']}") for row in rows)
    names = max(len("variant"), *(len(row["variant"]) for row in rows))
    lines = [f"{'case':{width}} {'variant':{names}}     p50 ms    GB/s  TFLOP/s  ceiling  peak MB ratio"]

    def column(row: dict[str, Any], key: str, form: str, size: int) -> str:
        return f"{row[key]:{size}{form}}" if key in row else " " * size

    for row in rows:
        line = f"{row['suite'] + ' ' + row['case']:{width}} {row['variant']:{names}} "
        if "failed" in row:
            lines.append(line + f"failed: {row['failed']}")
            continue
        line += " ".join(
            column(row, key, form, size)
            for key, form, size in (
                ("p50_ms", ".3f", 10),
                ("gb_per_s", ".1f", 7),
                ("tflop_per_s", ".3f", 8),
                ("of_ceiling", ".1%", 8),
                ("peak_mb", ".3g", 8),
            )
        )
        if ratio := row.get("ratio"):
            line += f" {ratio['p50']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
            line += f", target {row['target']:g}x" if "target" in row else ""
        lines.append(line)
    return lines
