"""``--config FILE.yaml``: values by option name, read as the flags of the same name are.

The file is YAML 1.2 (its core schema, as JSON): ``no`` and ``2024-01-01`` are texts, ``1e-5`` is a number, and only
``true`` and ``false`` are truth values inside lists and mappings. The value of an option is read by its flag, so that
``eval_strategy: no`` and ``fp16: no`` both mean what ``--eval_strategy no`` and ``--fp16 no`` mean.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml

from .errors import did_you_mean, expectation

MAX_BYTES = 1 << 20
_TAG = "tag:yaml.org,2002:"


class Option(NamedTuple):
    """An option's flag, and the annotation of its field."""

    action: argparse.Action
    hint: Any

    def takes(self, kind: type | None) -> bool:
        """Whether the annotation, or a member of the union that it is, is ``kind`` (None for null)."""
        members = {get_origin(member) or member for member in (self.hint, *get_args(self.hint))}
        return (type(None) if kind is None else kind) in members


class Core(yaml.SafeLoader):
    """YAML 1.2's core schema; a key that comes twice is refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as in PyYAML

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        unique_keys(node)
        return super().construct_mapping(node, deep)

    def integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    Core.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)
Core.add_constructor(_TAG + "int", Core.integer)


def unique_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            raise ValueError(f"{place(key)}: {key.value}: expected once, got it again")
        seen.add(key.value)


def place(node: yaml.Node) -> str:
    """``file:line``."""
    return f"{node.start_mark.name}:{node.start_mark.line + 1}"


def read_config(path: Path, command: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """The values in a file by option name.

    Raises:
        ValueError: not a YAML file of at most a mebibyte, an unknown option, or a value that the option does not take;
            the message names the file and the line.
    """
    root, loader = _compose(path)
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == _TAG + "null"):
        return {}
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else repr(root.value)
        raise ValueError(f"{place(root)}: expected options of flr {command} as name: value, got {kind}")
    unique_keys(root)
    values = {}
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in options:
            name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping as a name"
            hint = did_you_mean(name, options)
            raise ValueError(f"{place(key)}: expected options of flr {command}, got {name}{hint}")
        values[key.value] = _value(loader, key.value, node, options[key.value])
    return values


def _compose(path: Path) -> tuple[yaml.Node | None, Core]:
    """The file's nodes, which know their lines, and the loader that makes values of them."""
    if not path.is_file():  # a pipe could be without end
        what = "something else" if path.exists() else "nothing"
        raise ValueError(f"config: expected a YAML file, got {what} at {path}")
    data = path.open("rb").read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got more")
    try:
        loader = Core(data.decode())
        loader.name = str(path)
        return loader.get_single_node(), loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: expected YAML, got {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML in UTF-8, got {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected lists and mappings a few levels deep, got too many levels") from None


def _value(loader: Core, name: str, node: yaml.Node, option: Option) -> Any:
    if isinstance(node, yaml.SequenceNode):
        if not option.takes(list):
            raise ValueError(f"{place(node)}: {name}: expected one value, got a list")
        return [_scalar(name, item, option) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        if not option.takes(dict):
            raise ValueError(f"{place(node)}: {name}: expected a value, got a mapping")
        return _mapping(loader, name, node)
    value = _scalar(name, node, option)
    return [value] if option.action.nargs == "+" and value is not None else value


def _scalar(name: str, node: yaml.Node, option: Option) -> Any:
    """One value, read as the flag reads it."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{place(node)}: {name}: expected a list of values, got lists or mappings in it")
    if node.tag.removeprefix(_TAG) not in ("null", "bool", "int", "float", "str"):
        raise ValueError(f"{place(node)}: {name}: expected a plain value, got the tag {node.tag}")
    if node.tag == _TAG + "null":
        if option.takes(None) or option.action.default is None:
            return None
        raise ValueError(f"{place(node)}: {name}: expected {expectation(option.action)}, got null")
    action = option.action
    try:
        value = action.type(node.value) if callable(action.type) else node.value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        value = action
    if value is action or (action.choices is not None and value not in action.choices):
        raise ValueError(f"{place(node)}: {name}: expected {expectation(action)}, got {node.value!r}")
    return value


def _mapping(loader: Core, name: str, node: yaml.MappingNode) -> Any:
    """A mapping as JSON could say it: texts as keys, numbers, no loops."""
    try:
        value = loader.construct_document(node)
        json.dumps(value)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{place(node)}: {name}: expected plain values, got {error.problem}") from None
    except (ValueError, TypeError, RecursionError) as error:
        if str(error).startswith(f"{node.start_mark.name}:"):
            raise
        raise ValueError(f"{place(node)}: {name}: expected what JSON can say, got {error}") from None
    return value
