"""What a command says when it cannot go on: one line."""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Iterable

#: The extra that brings a package which a plain installation may lack.
EXTRAS = {
    "fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve", "starlette": "serve", "pydantic": "serve",
    "peft": "peft", "bitsandbytes": "qlora", "gguf": "gguf", "matplotlib": "plots", "tensorboard": "tensorboard",
    "cut_cross_entropy": "cce", "pytest": "bench", "pytest_benchmark": "bench", "ray": "ray",
}  # fmt: skip
_LONGEST = 300  # characters of an error that others wrote
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: How libraries say the same without an error number: safetensors, then torch.save.
_NO_ROOM_TEXTS = (
    "No space left on device",
    "(os error 28)",
    "(os error 27)",
    "PytorchStreamWriter failed",
    "unexpected pos ",
)


class UsageError(ValueError):
    """Flags that a command does not take; exit status 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean …?"`` where a known name is like this one, else nothing.

    >>> did_you_mean("lama", ["gpt2", "llama"]), did_you_mean("qwen", ["gpt2", "qwen2"]), did_you_mean("x", ["gpt2"])
    ('; did you mean llama?', '; did you mean qwen2?', '')
    """
    from rapidfuzz import fuzz, process  # here: flr --help is quick without

    near = process.extractOne(name, list(known), scorer=fuzz.ratio, score_cutoff=60)
    return f"; did you mean {near[0]}?" if near else ""


def expectation(action: argparse.Action) -> str:
    """What a flag takes, in words."""
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    name = getattr(action.type, "__name__", "str")
    words = {"int": "an integer", "float": "a number", "str": "a text", "string_to_bool": "true or false"}
    return words.get(name, name)


def usage_error(error: argparse.ArgumentError, actions: Iterable[argparse.Action]) -> UsageError:
    """argparse's refusal of a flag, in the form of all errors."""
    flags = (error.argument_name or "").split("/")
    action = next((a for a in actions if flags[0] in a.option_strings), None)
    name = flags[0].lstrip("-") or "options"
    given = re.match(r"invalid (?:choice|\w+ value): ('.*?'|\S+)(?: \(choose from|$)", error.message)
    given = given or re.match(r"Truthy value expected: got (.*?) but", error.message)
    if action is None or error.message.startswith("ignored explicit"):
        return UsageError(f"{name}: expected {error.message.removeprefix('expected ')}")
    if error.message.startswith("expected"):
        return UsageError(f"{name}: expected {expectation(action)}, got none")
    return UsageError(f"{name}: expected {expectation(action)}, got {given[1] if given else error.message}")


def message(error: Exception, command: str) -> str:
    """One line about why ``flr command`` stopped; an error of a kind that nobody expected is named by its type."""
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    if number in _NO_ROOM or (": expected " not in text and any(mark in text for mark in _NO_ROOM_TEXTS)):
        where = getattr(error, "filename", None) or "the folder that is written to"
        reason = os.strerror(number) if number else text[:_LONGEST]
        return f"{where}: expected room on its disk, got too little ({reason})"
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package.isidentifier():
        source = f'"flr[{EXTRAS[package]}]"' if package in EXTRAS else package
        return f"this command needs {package}: pip install {source}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    absent = isinstance(error, ImportError) and (isinstance(error, ModuleNotFoundError) or error.name is None)
    if absent or isinstance(error, ValueError | OSError) or _is_backend(error):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text[:_LONGEST]}; flr --debug {command} … shows the traceback"


def _is_backend(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from flr_kernels import BackendUnavailable  # here: flr --help is quick without

    return isinstance(error, BackendUnavailable)
