"""Times as text: numbers, ISO 8601, and ``Wed Jul 02 12:10:24 -0700 2014``; bounds on the times of a log."""

from __future__ import annotations

import datetime
import math
import re
from contextlib import suppress
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .events import InteractionLog
from .report import ReadReport

EXACT = 2.0**53  # a float is a whole number exactly up to here
_LATEST = 4102444800  # 2100-01-01, in seconds
_EARLIEST = 315532800  # 1980-01-01: from here to 2100 times in s, ms, µs and ns are told apart by their size
_UNITS = (1, 10**3, 10**6, 10**9)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_INTEGER = "^-?[0-9]{1,19}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_ASCTIME = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) (\d{2}) (\d{2}:\d{2}:\d{2}) ([+-]\d{2})(\d{2}) (\d{4})", re.ASCII)


@lru_cache(maxsize=1 << 16)
def moment(text: str) -> int | None:
    """Microseconds since 1970 of a date or a time, which is UTC where it has no zone; None for anything else.

    >>> moment("1970-01-02"), moment("1970-01-01 01:00:00+01:00"), moment("Thu Jan 01 00:00:01 +0000 1970")
    (86400000000, 0, 1000000)
    """
    asctime = _ASCTIME.fullmatch(text)
    if asctime:
        month, day, clock, hours, minutes, year = asctime.groups()
        if month not in _MONTHS:
            return None
        text = f"{year}-{_MONTHS.index(month) + 1:02}-{day} {clock}{hours}:{minutes}"
    try:
        value = datetime.datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith("Z") else text)
        value = value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)
        return (value - _EPOCH) // datetime.timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None


class Clock:
    """Reads a column of times, block by block; its first time decides whether they are numbers or dates.

    Args:
        per_second: how many units of a number are a second, None where that is not known. Where it is known, times lie
            between 1970 and 2100.
    """

    def __init__(self, per_second: int | None = None) -> None:
        self._per_second = per_second
        self._dates: bool | None = None

    @property
    def per_second(self) -> int | None:
        """Units of a second, None where they are not known."""
        return 10**6 if self._dates else self._per_second

    @property
    def expected(self) -> str:
        """What a time is expected to be, in words."""
        if self._dates is None:
            return "a number or a date"
        return "a date" if self._dates else "a number" if self._per_second is None else "a time before 2100"

    def read(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Times int64 or float64 [n] of ``texts``, and which are none, bool [n] (their value says nothing)."""
        texts = pc.if_else(pc.equal(texts, ""), None, texts)
        if self._dates is None:
            self._dates = _are_dates(texts)
        values = _dates(texts) if self._dates else _numbers(texts)
        missing = pc.is_null(values)
        filled = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
        bad = missing.to_numpy(zero_copy_only=False) | (
            ~(np.abs(filled) < EXACT) if filled.dtype.kind == "f" else np.zeros(len(filled), bool)
        )
        if not self._dates and self._per_second is not None:
            bad |= ~((filled >= 0) & (filled < _LATEST * self._per_second))
        return np.where(bad, filled.dtype.type(0), filled), bad


def _are_dates(texts: pa.Array) -> bool | None:
    for text in texts.drop_null().to_pylist():
        if re.fullmatch(_NUMBER.strip("^$"), text):
            return False
        if moment(text) is not None:
            return True
    return None


def _numbers(texts: pa.Array) -> pa.Array:
    """int64 where all are integers, else float64; null for what is no number."""
    good = pc.fill_null(pc.match_substring_regex(texts, _INTEGER), True)
    if pc.all(good).as_py() is not False:
        with suppress(pa.ArrowInvalid):  # 2^63 and more
            return texts.cast(pa.int64())
    return pc.if_else(pc.match_substring_regex(texts, _NUMBER), texts, None).cast(pa.float64())


def _dates(texts: pa.Array) -> pa.Array:
    """Microseconds since 1970, int64; null for what is no date."""
    try:
        return texts.cast(pa.timestamp("us")).cast(pa.int64())
    except pa.ArrowInvalid:  # zones, other forms, or no dates
        listed = texts.to_pylist()
        return pa.array([None if text is None else moment(text) for text in listed], pa.int64())


def check_bounds(since: str | float | None, until: str | float | None) -> None:
    """ValueError for a bound that is neither a date nor a number."""
    for name, value in (("since", since), ("until", until)):
        if value is not None:
            _parsed(name, value)


def seconds_of(name: str, value: str | float) -> float:
    """Seconds since 1970 of an ISO date or a number of them; ValueError for anything else.

    >>> seconds_of("since", "2001-09-09"), seconds_of("since", "1000000000")
    (999993600.0, 1000000000.0)
    """
    number, is_date = _parsed(name, value)
    if not is_date:
        _check_number(name, value)
    return number


def within(
    log: InteractionLog, since: str | float | None, until: str | float | None, report: ReadReport
) -> InteractionLog:
    """The events of since <= time < until; ``report`` notes how many others there are.

    Args:
        log: the events.
        since, until: ISO dates (UTC where they have no zone); numbers are seconds since 1970, or in the log's own unit
            where that is not known. None for no bound.
        report: gets the note.

    Raises:
        ValueError: a log without times; a bound that is neither; a date for times whose unit does not show.

    Example:
        >>> log = InteractionLog(["a"], ["x"], np.zeros(2, int), np.zeros(2, int), np.array([10**9, 10**9 + 86400]))
        >>> len(within(log, "2001-09-09T12:00", None, ReadReport()))
        1
    """
    if since is None and until is None:
        return log
    if log.times is None:
        name, value = ("since", since) if since is not None else ("until", until)
        raise ValueError(f"{name}: expected none for a log without times ({report.source}), got {value!r}")
    keep = np.ones(len(log), bool)
    if since is not None:
        keep &= log.times >= _bound(log, "since", since)
    if until is not None:
        keep &= log.times < _bound(log, "until", until)
    if not keep.all():
        report.notes.append(f"{int((~keep).sum())} events outside since={since!r}, until={until!r}")
    return log.select(keep)


def _parsed(name: str, value: str | float) -> tuple[float, bool]:
    """Seconds of a date and True, or a number and False."""
    if isinstance(value, str) and not re.fullmatch(_NUMBER.strip("^$"), value):
        micros = moment(value)
        if micros is not None:
            return micros / 10**6, True
    elif not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value), False
    raise ValueError(f"{name}: expected an ISO date or seconds since 1970, got {value!r}")


def _check_number(name: str, value: str | float) -> None:
    if isinstance(value, str) and len(value) <= 8:  # 2015, 20150101
        raise ValueError(f"{name}: expected an ISO date (2015-01-01) or seconds since 1970, got {value!r}")


def _bound(log: InteractionLog, name: str, value: str | float) -> float:
    """A bound in the unit of the log's times."""
    number, is_date = _parsed(name, value)
    if is_date:
        unit = log.per_second or _unit(log)
        if unit is None:
            assert log.times is not None
            wanted = f"{name}: expected times in s, ms, µs or ns since 1970 for a date"
            got = f"got times from {log.times.min():g} to {log.times.max():g}"
            raise ValueError(f"{wanted}, {got}; give a number of their unit")
        return number * unit
    if log.per_second is not None:
        _check_number(name, value)
    return number * (log.per_second or 1)


def _unit(log: InteractionLog) -> int | None:
    """Units of a second by the size of the times: all of them lie between 1980 and 2100."""
    if log.times is None or not len(log):
        return 1
    low, high = log.times.min(), log.times.max()
    return next((unit for unit in _UNITS if _EARLIEST * unit <= low and high < _LATEST * unit), None)
