"""How a command's options are read, and how its result is printed."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any, get_type_hints

from flr.config import FLRConfig

from . import voice
from .errors import UsageError, did_you_mean, usage_error

#: Help of the option ``--revision``, which stands beside ``--model``.
REVISION = "Branch, tag or commit of a model on the Hub."


def _docstring_help(cls: type) -> dict[str, str]:
    """Help texts from a docstring's Attributes section: ``name: text`` and ``a, b: text``."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        match = re.match(r"    ([a-z_, ]+): (.*)", line)
        if match:
            names = match[1].split(", ")
            texts |= dict.fromkeys(names, match[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return {name: text.replace("``", "").replace("%", "%%") for name, text in texts.items()}


def parse(command: str, about: str, classes: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    """Options of a command: one instance of each dataclass.

    ``--config FILE.yaml`` gives values by option name, flags override them; see :mod:`flr.cli.config_file`.

    Raises:
        UsageError: a flag that the command does not have, or a value that it does not take.
        ValueError: the same in the file, with its name and the line.
    """
    from transformers import HfArgumentParser

    about_flags: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
    parser = HfArgumentParser(classes, prog=f"flr {command}", description=about, **about_flags)  # type: ignore[arg-type]
    parser.add_argument("--config", default=None, help="YAML file with values for the options below.")
    add_voice(parser)
    documented = _docstring_help(FLRConfig) if FLRConfig in classes else {}
    for action in parser._actions:
        action.help = action.help or documented.get(action.dest)
    try:
        config = parser.parse_known_args(argv)[0].config
        if config is not None:
            from .config_file import Option, read_config

            flags = {a.dest: a for a in reversed(parser._actions)}  # of --x and --no_x the first one
            hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
            names = [f.name for cls in classes for f in dataclasses.fields(cls) if f.init]
            options = {name: Option(flags[name], hints[name]) for name in names}
            parser.set_defaults(**read_config(Path(config), command, options))
        unknown = parser.parse_known_args(argv)[1]
    except argparse.ArgumentError as error:
        raise usage_error(error, parser._actions) from None
    if unknown:
        near = did_you_mean(unknown[0].partition("=")[0], parser._option_string_actions)
        raise UsageError(f"expected options of flr {command}, got {unknown[0]}{near}")
    *parsed, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    voice.choose(rest.quiet, rest.verbose, rest.json)
    return (*parsed, types.SimpleNamespace(**vars(rest)))


def add_voice(parser: argparse.ArgumentParser) -> None:
    """The flags that every command has: how it speaks."""
    parser.add_argument("--json", action="store_true", help="Print the result as JSON on standard output.")
    parser.add_argument("--quiet", action="store_true", help="Say results, warnings and errors alone.")
    parser.add_argument("--verbose", action="store_true", help="Show what the libraries underneath say, too.")


def emit(result: dict[str, Any], as_json: bool) -> None:
    """The machine-readable result on standard output, if asked for."""
    if as_json and voice.first_process():
        json.dump(result, sys.stdout, indent=2)
        print()
