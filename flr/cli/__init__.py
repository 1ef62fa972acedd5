"""The ``flr`` command: ``flr <command> --help``.

An error is one line on standard error. ``flr --debug <command>`` and ``FLR_DEBUG=1`` show its traceback instead.
"""

from __future__ import annotations

import importlib
import os
import sys

from .errors import UsageError, did_you_mean, message

COMMANDS = {
    "quickstart": "the whole tour on generated data: train, compare, explain, report (minutes, no input needed)",
    "prepare": "turn logs (public sets, RecBole, CSV, Parquet, sequences) into a folder that the other commands read",
    "sids": "make semantic IDs for the items of a prepared folder, or read them from a file",
    "sft": "train a recommender on an interaction log",
    "rl": "reinforce the thoughts of a trained recommender: latent GRPO",
    "merge": "write an adapter and its base model as one model",
    "update": "learn new rows and items since the last run; kept only where it is not worse",
    "evaluate": "rank a split over the whole catalogue: HR, NDCG, MRR, intervals, baselines",
    "neighbours": "mix item-kNN or a linear model into a trained one's answers, chosen on valid",
    "views": "mix a model's answers to single items of a history into its own, chosen on valid",
    "compare": "train none / anchor / latentr3 / flr under one budget and several seeds; table and plot",
    "robustness": "ranking on damaged histories, and of cold items and users: table and plot",
    "factors": "which factors a model needs, and for what kind of item; the others pruned",
    "recommend": "top-k items for histories, with each factor's share",
    "batch": "everybody's lists, offline: Parquet in, Parquet out, on processes or on Ray",
    "export": "prompt and thought as a program, and the trie, for engines of others",
    "plan": "machines, hours and money for everybody's lists, from measured times",
    "bench": "run the benchmark suite, render its tables and figures, compare two results (needs a checkout)",
    "explain": "which history items each factor attends to: heat map and HTML page",
    "report": "one run, or two compared, as a page: training curves, factors over training, metrics by user group",
    "serve": "recommendations over HTTP, with a page that shows what the factors do",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for unusable arguments, 1 for anything else that went wrong).

    With ``--debug``, or ``FLR_DEBUG`` set to anything but 0, an error of the command is raised.
    """
    debug, argv = _debug(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
        print(
            f"usage: flr [--debug] <command> [options]\n\n{lines}\n\nflr <command> --help lists a command's options. "
            "--debug shows the traceback of an error."
        )
        return 0
    if argv[0] in ("-V", "--version"):
        from flr import __version__

        print(__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        print(f"flr: expected a command ({', '.join(COMMANDS)}), got {name!r}{near}", file=sys.stderr)
        return 2
    from . import voice

    try:
        with voice.speaking():
            status = importlib.import_module(f"flr.cli.{name}").main(argv[1:]) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        voice.fail(f"flr {name}: stopped")
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; Python's own flush at the end must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        voice.fail(f"flr {name}: {message(error, name)}")
        return 2 if isinstance(error, UsageError) else 1


def _debug(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether tracebacks are wanted, and the arguments without ``--debug``.

    A ``--debug`` with a value after it is one of transformers' TrainingArguments and stays.
    """
    rest = []
    for index, word in enumerate(argv):
        value = argv[index + 1 :][:1] if index else []
        if word != "--debug" or (value and not value[0].startswith("-")):
            rest.append(word)
    return len(rest) < len(argv) or os.environ.get("FLR_DEBUG", "0") not in ("", "0"), rest
