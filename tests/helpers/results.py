"""Made-up results of benchmarks."""

from __future__ import annotations

from bench import results


def planted(ratio=10.0, width=1.1, *, commit="a", date="2026-01-01T00:00:00Z", tier="default", case="x", ms=2.0):
    """A run with one race: ours, a competitor at ``ratio`` with a spread of ``width``, and one that failed."""
    common = {"suite": "s", "case": case, "shape": {"B": 2}, "tier": tier, "check": "passed"}
    times = {"p20_ms": ms, "p50_ms": ms, "p80_ms": ms}
    spread = {"p20": ratio / width, "p50": ratio, "p80": ratio * width}
    rows = [
        {**common, "variant": "flr", **times},
        {**common, "variant": "eager", **times, "ratio": spread, "target": 5.0},
        {**common, "variant": "broken", "failed": "RuntimeError: no"},
    ]
    facts = {"device": "CPU Some 3.0", "commit": commit, "dirty": False, "date": date, "threads": 1, "tier": tier}
    return {**facts, "versions": {"torch": "2"}, "ceilings": {"copy_gb_per_s": 10.0}, "rows": rows}


def saved(folder, *runs):
    """The path of a file that holds the runs."""
    for run in runs:
        path = results.append({k: v for k, v in run.items() if k != "rows"}, run["rows"], folder)
    return path
