"""What every command says, and where: results go to standard output, all else to standard error.

- A *result* is what the command was run for: a table, a sentence, where a file was written. Beside ``--json`` it goes
  to standard error, since standard output is the JSON alone.
- A *note* says what happens on the way, a *detail* what only ``--verbose`` asks for; ``--quiet`` leaves notes and
  progress out. Warnings are always said.
- While a command works there is one live line, on a terminal only; it leaves nothing behind.

On a terminal there are colours and rules; elsewhere the text is plain, and a row of a table is one line.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_out, _err = Console(highlight=False), Console(stderr=True, highlight=False)
_WIDTH = 200  # of a table that no terminal shows; what is wider is folded


@dataclass
class Manner:
    """How a command speaks; ``stage`` names the part of a longer work that is done, if it is one; ``logs``
    says whether what flr's modules log is said."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    stage: str = ""
    logs: bool = True


manner = Manner()


@contextmanager
def speaking() -> Iterator[None]:
    """For one command: what flr's modules log is said as warnings; at the end the libraries log as before."""
    before, listener, logger = dict(vars(manner)), _Said(), logging.getLogger("flr")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        vars(manner).update(before)
        if "transformers" in sys.modules:
            _libraries(loud=True)


def choose(quiet: bool, verbose: bool, json: bool) -> None:
    """How this command speaks, by its flags."""
    if quiet and verbose:
        raise ValueError("quiet: expected no --verbose beside it, got both")
    manner.quiet, manner.verbose, manner.json = quiet, verbose, json
    _libraries(loud=verbose)


def _libraries(loud: bool) -> None:
    """Bars of weights that are loaded, what transformers thinks of it, and that PEFT asks it by an old name."""
    from transformers.utils import logging as said

    warnings.filterwarnings("default" if loud else "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    (said.enable_progress_bar if loud else said.disable_progress_bar)()
    (said.set_verbosity_warning if loud else said.set_verbosity_error)()


class _Said(logging.Handler):
    """What flr's modules log, in the command's voice."""

    def emit(self, record: logging.LogRecord) -> None:
        if manner.logs and record.levelno >= logging.WARNING:
            warn(record.getMessage())


def first_process() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def _say(console: Console, what: Any, style: str = "") -> None:
    if not isinstance(what, Table):
        console.print(Text(str(what), style=style), soft_wrap=True)
        return
    if console.is_terminal:
        console.print(what)
        return
    rules, what.box = what.box, None
    Console(file=console.file, width=_WIDTH, highlight=False).print(what)
    what.box = rules


def result(what: Any) -> None:
    """A text, or a table of :func:`table`."""
    if not first_process():
        return
    if not manner.json:
        _say(_out, what)
    elif not manner.quiet:
        _say(_err, what)


def note(text: Any) -> None:
    """What happens on the way."""
    if not manner.quiet and first_process():
        _say(_err, text)


def detail(text: Any) -> None:
    """A note with ``--verbose``; in a longer work this is what one does not want to see for each of its parts."""
    if manner.verbose or not manner.stage:
        note(text)


def passing(text: Any) -> None:
    """A note that a live line says already: where there is none, or with ``--verbose``."""
    if manner.verbose or not shows_progress():
        note(text)


def warn(text: str) -> None:
    """What may make the result another one than was meant."""
    if first_process():
        _say(_err, f"Warning: {text}", "yellow")


def fail(text: str) -> None:
    """Why a command ends."""
    _say(_err, text, "red")


def table(title: str, *columns: str, text: int = 1) -> Table:
    """A table whose first ``text`` columns are words, the others numbers; title and heads are shown as they are."""
    heading = Text(title, style="bold") if title else None
    made = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        made.add_column(Text(name), justify="left" if place < text else "right", overflow="fold")
    return made


def plain(*cells: str) -> tuple[Text, ...]:
    """Cells whose text is shown as it is: titles hold brackets, which rich reads as markup."""
    return tuple(Text(cell) for cell in cells)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Within it the live line begins with ``name``, and details are for ``--verbose``."""
    before, manner.stage = manner.stage, name
    try:
        yield
    finally:
        manner.stage = before


def shows_progress() -> bool:
    """Whether there is a live line."""
    return _err.is_terminal and not manner.quiet and first_process()


@contextmanager
def live(*columns: ProgressColumn) -> Iterator[Progress]:
    """The live line: stage, bar, ``columns``, time left; nothing where :func:`shows_progress` is false.

    A task's description says what is done, its field ``facts`` what is known so far.
    """
    name = TextColumn("{task.description}", markup=False)
    shown = columns or (MofNCompleteColumn(), TextColumn("{task.fields[facts]}", markup=False), _Rate())
    left = TimeRemainingColumn(compact=True)
    options: dict[str, Any] = {"transient": True, "refresh_per_second": 5, "disable": not shows_progress()}
    with Progress(name, BarColumn(bar_width=24), *shown, left, console=_err, **options) as progress:
        yield progress


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} steps/s")
