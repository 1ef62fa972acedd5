"""The ``flr`` command: ``flr <command> --help``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "quickstart": "the whole tour on generated data: train, compare, explain, report (minutes, no input needed)",
    "prepare": "turn raw Amazon reviews, RecBole or Parquet logs into a folder that the other commands read",
    "sft": "train a recommender on an interaction log",
    "rl": "reinforce the thoughts of a trained recommender: latent GRPO",
    "evaluate": "rank a split over the whole catalogue: HR, NDCG, MRR, intervals, baselines",
    "compare": "train none / anchor / latentr3 / flr under one budget and several seeds; table and plot",
    "recommend": "top-k items for histories, with each factor's share",
    "bench": "run the benchmark suite, render its tables and figures, compare two results (needs a checkout)",
    "explain": "which history items each factor attends to: heat map and HTML page",
    "serve": "recommendations over HTTP, with a page that shows what the factors do",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for unusable arguments, 1 for input that was refused)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
        print(f"usage: flr <command> [options]\n\n{lines}\n\nflr <command> --help lists a command's options.")
        return 0
    if argv[0] in ("-V", "--version"):
        from flr import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"flr: expected a command ({', '.join(COMMANDS)}), got {argv[0]!r}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"flr.cli.{argv[0]}")
    try:
        return command.main(argv[1:]) or 0
    except (ValueError, OSError) as error:
        print(f"flr {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"flr {argv[0]}: stopped", file=sys.stderr)
        return 130
