"""One reading of something damaged: it succeeds, or one error names the place, in bounded time and words."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LONGEST = 4000  # characters of an error


def _late(*_: Any) -> None:
    raise TimeoutError("no answer in time")


def attempt(
    read: Callable[[Path], Any],
    folder: Path,
    seconds: int,
    places: tuple[Path, ...] = (),
    refusals: tuple[type[Exception], ...] = (),
) -> tuple[Any, str | None]:
    """What ``read`` gives, and None; or None and what is wrong with the error that it raised, "" for nothing.

    Args:
        read: reads ``folder``.
        seconds: a reader that takes longer hangs.
        places: an error may name these instead of ``folder``.
        refusals: errors that are right as they are.
    """
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(seconds)
    try:
        return read(folder), None
    except refusals:
        return None, ""
    except (ValueError, OSError) as error:
        text = str(error)
        named = any(str(place) in text for place in (folder, *places))
        fault = isinstance(error, TimeoutError) or not named or len(text) > _LONGEST
        return None, f"{type(error).__name__} {text[:300]}" if fault else ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return None, f"{type(error).__name__} {str(error)[:300]}"
    finally:
        signal.alarm(0)
