"""How a command's options are read, and how its result is printed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import HfArgumentParser

from flr.config import FLRConfig

console = Console(stderr=True)

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

    ``--config FILE.yaml`` gives values by option name, flags override them. An unknown name raises ValueError.
    """
    parser = HfArgumentParser(classes, prog=f"flr {command}", description=about)  # type: ignore[arg-type]
    parser.add_argument("--config", default=None, help="YAML file with values for the options below.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON on standard output.")
    documented = _docstring_help(FLRConfig) if FLRConfig in classes else {}
    for action in parser._actions:
        action.help = action.help or documented.get(action.dest)
    known = {f.name for cls in classes for f in dataclasses.fields(cls) if f.init}
    config = _config_file(argv)
    if config is not None:
        values = yaml.safe_load(config.read_text()) or {}
        if not isinstance(values, dict) or set(values) - known:
            odd = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{config}: expected options of flr {command}, got {odd}")
        parser.set_defaults(**values)
    *parsed, rest = parser.parse_args_into_dataclasses(argv)
    return (*parsed, types.SimpleNamespace(**vars(rest)))


def _config_file(argv: list[str]) -> Path | None:
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
    return None


def emit(result: dict[str, Any], as_json: bool) -> None:
    """The machine-readable result on standard output, if asked for."""
    if as_json:
        json.dump(result, sys.stdout, indent=2)
        print()
