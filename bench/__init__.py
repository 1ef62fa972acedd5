"""The benchmark suite: ``pytest bench/ --benchmark-only``; docs/benchmarks.md says how each number is made."""
